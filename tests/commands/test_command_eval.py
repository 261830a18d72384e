"""`sedac eval` through the command line and the real harness."""

from __future__ import annotations

import importlib.util
import json

import pytest
from conftest import run_python, save_tiny

pytest.importorskip("lm_eval")


@pytest.fixture
def evaluate(sedac, tiny_folder, toy_tasks, tmp_path):
    def call(*args, tasks="toy_choice,toy_rolling"):
        return sedac(
            "eval", "--model", tiny_folder, "--tasks", tasks, "--include-path", toy_tasks, "--out",
            tmp_path / "eval.json", *args,
        )  # fmt: skip

    return call


def test_dense_and_gated_side_by_side(evaluate, tmp_path):
    result = evaluate("--gate", "always:1", "--json", "--quiet")
    assert result.code == 0, result.err
    assert result.err == ""
    saved = json.loads((tmp_path / "eval.json").read_text())
    assert saved["report"] == result.json
    assert saved["versions"]["lm_eval"]
    assert saved["command"][0] == "sedac"
    choice, rolling = result.json["tasks"]
    assert (choice["task"], choice["samples"], choice["skip_ratio"]) == ("toy_choice", 12, 0.75)
    accuracy = choice["metrics"]["acc,none"]
    rows = choice["samples_raw"]["toy_choice"]
    for side in ("dense", "gated"):
        assert accuracy[side] == pytest.approx(sum(row[side]["acc,none"] for row in rows) / 12)
    changes = [row["gated"]["acc,none"] - row["dense"]["acc,none"] for row in rows]
    assert (accuracy["lost"], accuracy["won"]) == (changes.count(-1), changes.count(1))
    assert accuracy["drop"] == pytest.approx(-sum(changes) / 12)
    bits = rolling["metrics"]["bits_per_byte,none"]
    assert not bits["higher_is_better"]
    assert bits["drop"] == pytest.approx(bits["gated"] / bits["dense"] - 1)
    assert bits["drop"] != 0


def test_never_loses_nothing(evaluate):
    result = evaluate("--gate", "never", "--max-drop", "0")
    assert result.code == 0, result.err
    assert "toy_choice" in result.out
    assert "0.00%" in result.out


def test_one_task_that_collapses_fails_the_command(evaluate, tmp_path):
    drop = evaluate("--gate", "always:0", "--json").json["tasks"][1]["metrics"]["bits_per_byte,none"]["drop"]
    gate = ("--gate", "always:0", "--max-drop")
    result = evaluate(*gate, drop - 0.01, tasks="toy_rolling")
    assert (drop > 0, result.code) == (True, 1)
    assert "toy_rolling bits_per_byte,none" in result.err
    assert (tmp_path / "eval.json").exists()
    assert evaluate(*gate, 1e9).code == 0


def test_not_a_number_is_a_loss(sedac, toy_tasks, tmp_path):
    def spoil(model):
        model.model.layers[2].mlp.down_proj.weight.fill_(float("inf"))

    folder = save_tiny(tmp_path / "spoilt", change=spoil)
    result = sedac(
        "eval", "--model", folder, "--tasks", "toy_rolling", "--include-path", toy_tasks, "--gate", "always:3",
        "--out", tmp_path / "eval.json", "--max-drop", "1e9",
    )  # fmt: skip
    assert result.code == 1
    assert "nan" in result.err


def test_limit_and_no_dense(evaluate):
    task = evaluate("--gate", "always:2", "--limit", 5, "--no-dense", "--json", tasks="toy_generate").json["tasks"][0]
    assert task["samples"] == 5
    metric = task["metrics"]["exact_match,none"]
    assert (metric["dense"], metric["drop"], metric["lost"]) == (None, None, None)


@pytest.mark.parametrize(
    ("args", "tasks", "code", "says"),
    [
        (("--max-drop", 0.1, "--no-dense"), "toy_choice", 2, "compares with the dense model"),
        (("--batch-size", "many"), "toy_choice", 2, "'many' is not a number"),
        (("--limit", 2.5), "toy_choice", 2, "a whole number"),
        (("--gate", "alway:2"), "toy_choice", 2, "Did you mean 'always'?"),
        ((), "", 2, "no task named"),
        (("--include-path", "nowhere"), "toy_choice", 3, "no such folder: nowhere"),
    ],
)
def test_what_cannot_work_is_said_at_once(evaluate, args, tasks, code, says):
    result = evaluate(*args, tasks=tasks)
    assert (result.code, says in result.err) == (code, True), result.err


def test_a_missing_harness_says_what_to_install(evaluate, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = evaluate()
    assert result.code == 3
    assert "pip install 'sedac[eval]'" in result.err


def test_the_harness_s_own_command_line_knows_the_model_and_its_tasks(tiny_folder, toy_tasks, tmp_path):
    """Slow: the harness reads all its task files."""
    result = run_python(
        "-m", "sedac_cli.harness", "--model", "sedac", "--model_args", f"pretrained={tiny_folder},gate=always:2",
        "--tasks", "toy_choice", "--include_path", toy_tasks, "--device", "cpu", "--output_path", tmp_path / "out",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "toy_choice" in result.out
    assert "gate': 'always:2" in result.out
    (saved,) = (tmp_path / "out").rglob("results*.json")
    assert json.loads(saved.read_text())["n-samples"]["toy_choice"]["effective"] == 12
