"""A short soak: the script that runs 10,000 requests, with 200; and its judge sees what is off."""

from __future__ import annotations

import copy
import importlib.util
import json

import pytest
from conftest import ROOT, run_python

SCRIPT = ROOT / "benchmarks" / "serve_soak.py"


def script():
    spec = importlib.util.spec_from_file_location("serve_soak", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def soaked(chatty_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("soak") / "soak.json"
    result = run_python(
        SCRIPT, "--model", chatty_folder, "--gate", "always:2", "--requests", 200, "--clients", 12, "--max-queue", 12,
        "--max-slope", 1e9, "--out", out,
    )  # fmt: skip
    assert result.code == 0, result.out + result.err
    return json.loads(out.read_text())


def test_two_hundred_requests(soaked):
    assert soaked["faults"] == []
    first, second = soaked["stretches"]
    for stretch in (first, second):
        assert sum(n for name, n in stretch["outcomes"].items() if not name.endswith("429")) == 100
        assert stretch["seen"]["exits 2"] > 0
    assert first["counted"]["sedac_exits_total{2}"] == first["seen"]["exits 2"]
    assert any(name.endswith("hung up") for name in second["outcomes"])


@pytest.mark.parametrize(
    ("stretch", "part", "key", "says"),
    [
        (0, "counted", "sedac_exits_total{2}", "exits 2"),
        (0, "counted", "sedac_generated_tokens_total", "new tokens"),
        (0, "counted", "sedac_requests_total{completions,ok}", "completions"),
        (1, "counted", "sedac_requests_total{chat,unauthorized}", "chat"),
        (1, "seen", "calls decode", "calls decode"),
        (0, "left", "sedac_running", "when all is over"),
        (1, "outcomes", "whole: 500", "unexpected answers"),
    ],
)
def test_its_judge_sees(soaked, stretch, part, key, says):
    soak = script()
    assert soak.judge(soaked, 1e9) == []
    wrong = copy.deepcopy(soaked)
    found = wrong["stretches"][stretch][part]
    found[key] = found.get(key, 0) + (10**6 if part == "seen" else 1)
    assert any(says in fault for fault in soak.judge(wrong, 1e9))


def test_its_judge_sees_memory_grow():
    soak = script()
    samples = [(done, 500 + done / 100, 30) for done in range(0, 1000, 10)]
    assert soak.slope(samples) == pytest.approx(10)
    assert soak.slope([(done, 500 + done % 20 / 10, 30) for done in range(0, 1000, 10)]) < 1
