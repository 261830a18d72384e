"""The scripts that figures come from start: most of them need a GPU, and what they import moves on without them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = [path for path in sorted(FOLDER.glob("*.py")) if "ArgumentParser" in path.read_text()]


def test_there_are_scripts():
    assert {"gpu_engine.py", "gpu_nodes.py", "cpu.py"} <= {path.name for path in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_says_how_it_is_used(script):
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def test_the_engine_s_figures_are_printed_from_their_samples():
    """Floors at twice the bandwidth are half as long: every step is then twice as far above its own."""
    path = FOLDER / "results" / "gpu_engine.json"
    facts = json.loads(path.read_text())
    twice = 2 * facts["read_bytes_per_s"] / 1e12
    done = subprocess.run(
        [sys.executable, FOLDER / "gpu_engine.py", "--show", path, "--reads", str(twice)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "of ungated" in line]
    assert len(lines) == len(facts["cases"])
    for line, case in zip(lines, facts["cases"], strict=True):
        step = sorted(case["samples_ms"])[len(case["samples_ms"]) // 2]
        assert case["case"] in line
        assert float(line.split(" ms ")[0].split()[-1]) == pytest.approx(step, rel=0.01)
        assert float(line.split("x floor")[0].split()[-1]) == pytest.approx(2 * case["over_floor"], abs=0.006)
