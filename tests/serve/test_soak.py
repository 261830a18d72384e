"""A short soak: the script that runs 10,000 requests, with 200; and without hanging up its counters agree exactly."""

from __future__ import annotations

import json

from conftest import ROOT, run_python

SCRIPT = ROOT / "benchmarks" / "serve_soak.py"


def test_two_hundred_requests(chatty_folder, tmp_path):
    out = tmp_path / "soak.json"
    result = run_python(
        SCRIPT, "--model", chatty_folder, "--gate", "always:2", "--requests", 200, "--clients", 12, "--max-queue", 12,
        "--max-slope", 1e9, "--out", out,
    )  # fmt: skip
    assert result.code == 0, result.out + result.err
    found = json.loads(out.read_text())
    assert found["faults"] == []
    answered = sum(n for name, n in found["outcomes"].items() if not name.endswith("429"))
    assert answered == 200
    assert found["seen"]["requests"] > 120
    assert found["counters"]["sedac_exits_total{2}"] >= found["seen"]["exits 2"] > 0
