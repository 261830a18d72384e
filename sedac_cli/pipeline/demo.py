"""What `sedac demo` runs: the whole pipeline on the built-in model and text, small enough for two cores.

config = demo_config(device="cpu")      # as a file for `sedac run` would say it
"""

from __future__ import annotations

from typing import Any

SAMPLES, MAX_LENGTH, CHECK_SAMPLES = 60, 512, 16


def demo_config(device: str = "auto") -> dict[str, Any]:
    """Probes learn the harm of skipping from their layer on; thresholds let a quarter of the tokens exit somewhere; the
    gated model is then compared with the dense one on other books."""
    return {
        "model": "builtin:tiny",
        "device": device,
        "dataset": "builtin:books",
        "max-length": MAX_LENGTH,
        "collect": {"samples": SAMPLES, "layers": [7, 14, 21], "target": "harm"},
        "train-probes": {"epochs": 10},
        "calibrate": {"strategy": "aggressive"},
        "validate": {"samples": CHECK_SAMPLES, "split": "validation"},
        "report": {},
    }
