"""The whole pipeline on the built-in model and text: what `make demo` runs, small enough for two cores.

report = demo(Path("sedac_demo"), seed=0, say=print)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sedac_cli.artifacts.thresholds import Thresholds
from sedac_cli.config import ModelSpec, TextSpec
from sedac_cli.gates.registry import gate_from_thresholds
from sedac_cli.models import load_model
from sedac_cli.pipeline import Progress, quiet_progress
from sedac_cli.pipeline.calibrate import CalibrateOptions, CalibrateReport, calibrate
from sedac_cli.pipeline.collect import CollectOptions, CollectReport, collect
from sedac_cli.pipeline.data import CollectedData
from sedac_cli.pipeline.train_probes import TrainOptions, TrainReport, train_probes
from sedac_cli.pipeline.validate import ValidateOptions, ValidateReport, validate, write_validation

SAMPLES, MAX_LENGTH, CHECK_SAMPLES = 60, 512, 16


@dataclass(frozen=True)
class DemoReport:
    folder: Path
    collected: CollectReport
    trained: TrainReport
    calibrated: CalibrateReport
    validated: ValidateReport
    seconds: float


def demo(
    folder: Path, seed: int, say: Callable[[str], None], progress: Progress = quiet_progress, device: str = "auto"
) -> DemoReport:
    """Every verb in turn, each reading the files of the one before."""
    began = time.monotonic()
    model = ModelSpec("builtin:tiny", device=device)
    text = TextSpec("builtin:books", samples=SAMPLES, max_length=MAX_LENGTH, seed=seed)
    say(f"collect: {SAMPLES} samples of {MAX_LENGTH} tokens, checkpoints 7, 14, 21")
    collected = collect(CollectOptions(save_dir=folder, target="harm", overwrite=True), model, text, progress)
    say("train-probes: one probe per checkpoint learns the harm of skipping from there on")
    trained = train_probes(folder, TrainOptions(epochs=10, seed=seed), progress)
    say("calibrate: thresholds for a quarter of the tokens to exit somewhere")
    calibrated = calibrate(folder, CalibrateOptions(strategy="aggressive"))
    say("validate: the model run dense and gated on other books")
    loaded = load_model(model)
    gate = gate_from_thresholds(Thresholds.read(calibrated.file), folder, loaded.decoder)
    other = TextSpec("builtin:books", split="validation", samples=CHECK_SAMPLES, max_length=MAX_LENGTH, seed=seed)
    report, evaluation = validate(
        loaded, gate, other, ValidateOptions(seed=seed), CollectedData.open(folder), progress=progress
    )
    write_validation(folder / "validate.json", report, evaluation)
    return DemoReport(folder, collected, trained, calibrated, report, time.monotonic() - began)
