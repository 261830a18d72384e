"""lm-eval tasks in a matrix, by the real harness on tasks of our own."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("lm_eval")

from sedac_cli.harness import run as harness


@pytest.fixture
def bench(sedac, tmp_path, tiny_folder, text_file, toy_tasks):
    def call(*args):
        return sedac(
            "bench", "--save-dir", tmp_path / "out", "-m", tiny_folder, "--dataset", text_file, "--new-tokens", 2, "--repeats", 1,
            "--prompt-lengths", "8", "--quality-samples", 0, "--task-folder", toy_tasks, *args,
        )  # fmt: skip

    call.document = lambda: json.loads((tmp_path / "out" / "bench.json").read_text())
    call.report = lambda: (tmp_path / "out" / "report.md").read_text()
    return call


def test_scores_task_by_task_dense_run_once(bench, monkeypatch):
    runs = []
    original = harness._run

    def counted(lm, task, manager, options, gated):
        runs.append((task, gated))
        return original(lm, task, manager, options, gated)

    monkeypatch.setattr(harness, "_run", counted)
    result = bench("--gates", "always:1,always:3", "--tasks", "toy_choice, toy_rolling", "-q", "--json")
    assert result.code == 0, result.err
    assert result.json == bench.document()
    assert sorted(runs) == sorted(
        [(task, gated) for task in ("toy_choice", "toy_rolling") for gated in (False, True, True)]
    )
    dense, first, second = bench.document()["configurations"]
    assert dense["quality"] is None
    choice = first["quality"]["tasks"]["toy_choice"]
    assert (choice["documents"], choice["skip_ratio"]) == (12, 0.75)
    rows, accuracy = choice["samples"]["toy_choice"], choice["metrics"]["acc,none"]
    assert accuracy["own"] == pytest.approx(sum(row["gated"]["acc,none"] for row in rows) / 12)
    assert accuracy["dense"] == pytest.approx(sum(row["dense"]["acc,none"] for row in rows) / 12)
    bits = [c["quality"]["tasks"]["toy_rolling"]["metrics"]["bits_per_byte,none"] for c in (first, second)]
    assert bits[0]["dense"] == bits[1]["dense"]
    assert bits[0]["own"] != bits[1]["own"]
    assert second["quality"]["tasks"]["toy_choice"]["skip_ratio"] == 0.25
    assert bench.report().count("| toy_rolling | bits_per_byte,none (low) | 12 |") == 2


def test_unknown_tasks_are_refused_before_anything_is_measured(bench, tmp_path):
    result = bench("--gates", "always:1", "--tasks", "toy_choise")
    assert (result.code, "Did you mean 'toy_choice'" in result.err) == (2, True)
    assert not (tmp_path / "out" / "bench.json").exists()


def test_fewer_documents(bench):
    assert bench("--gates", "always:1", "--tasks", "toy_choice", "--task-limit", 5).code == 0
    assert bench.document()["configurations"][1]["quality"]["tasks"]["toy_choice"]["documents"] == 5
