"""The demo runs every verb, leaves a folder each later verb can use, and no other folder alone in ruins."""

from __future__ import annotations

import shlex

import pytest

from sedac_cli.artifacts.manifest import Manifest
from sedac_cli.pipeline import demo as module


@pytest.fixture
def small(monkeypatch):
    for name, value in {"SAMPLES": 8, "MAX_LENGTH": 48, "CHECK_SAMPLES": 4}.items():
        monkeypatch.setattr(module, name, value)


def test_the_whole_pipeline(sedac, small, tmp_path):
    result = sedac("demo", "--save-dir", tmp_path / "demo", "--json")
    assert result.code == 0, result.err
    report = result.json
    assert report["collected"]["tokens"] == 8 * 48
    assert [x["layer"] for x in report["trained"]["layers"]] == [7, 14, 21]
    assert report["validated"]["measures"]["ppl_ratio"] > 0
    manifest = Manifest.read(tmp_path / "demo")
    for step in ("collect", "train-probes", "calibrate"):
        manifest.verify(tmp_path / "demo", step)
    text = ("--dataset", "builtin:books", "--split", "validation", "--samples", 2, "--max-length", 32)
    again = sedac("validate", "--data-dir", tmp_path / "demo", *text)
    assert again.code == 0, again.err
    gate = f"cascade:{tmp_path / 'demo' / 'thresholds.json'}"
    assert sedac("generate", "--prompt", "The sea", "--max-new-tokens", 3, "--gate", gate).code == 0

    second = sedac("demo", "--save-dir", tmp_path / "demo", "--seed", 1)
    assert second.code == 0, second.err
    assert "perplexity" not in second.err
    assert "report.html" in second.out
    told = next(line for line in second.out.splitlines() if "sedac generate" in line)
    assert sedac(*shlex.split(told.partition("sedac ")[2])).code == 0  # what it says to try works


def test_somebody_elses_collection_is_left_alone(sedac, small, copied):
    before = {p.name: p.read_bytes() for p in copied.iterdir()}
    result = sedac("demo", "--save-dir", copied)
    assert result.code == 3
    assert "not a demo's" in result.err
    assert {p.name: p.read_bytes() for p in copied.iterdir()} == before


def test_an_unfinished_collection_is_left_alone_too(sedac, small, copied):
    (copied / "manifest.json").unlink()
    (copied / ".partial").mkdir()
    (copied / ".partial/run.json").write_text('{"settings": {"layers": [1]}}')
    assert sedac("demo", "--save-dir", copied).code == 3
    assert (copied / ".partial/run.json").exists()
