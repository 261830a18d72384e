"""The whole pipeline on the built-in model and text: what `make demo` runs, small enough for two cores.

report = demo(Path("sedac_demo"), seed=0, say=print)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from sedac_cli.artifacts.files import read_json
from sedac_cli.artifacts.manifest import MANIFEST, Manifest
from sedac_cli.artifacts.thresholds import Thresholds
from sedac_cli.config import ModelSpec, TextSpec
from sedac_cli.errors import InputError
from sedac_cli.gates.registry import gate_from_thresholds
from sedac_cli.models import load_model
from sedac_cli.pipeline import Progress, quiet_progress
from sedac_cli.pipeline.calibrate import CalibrateOptions, CalibrateReport, calibrate
from sedac_cli.pipeline.collect import PARTIAL, CollectOptions, CollectReport, collect, collect_settings
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
    """Every verb in turn, each reading the files of the one before. A folder that no demo wrote is left alone."""
    began = time.monotonic()
    model = ModelSpec("builtin:tiny", device=device)
    text = TextSpec("builtin:books", samples=SAMPLES, max_length=MAX_LENGTH, seed=seed)
    options = CollectOptions(save_dir=folder, target="harm", overwrite=True)
    _refuse_foreign(folder, options, text)
    say(f"collect: {SAMPLES} samples of {MAX_LENGTH} tokens, checkpoints 7, 14, 21")
    collected = collect(options, model, text, progress)
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


def _refuse_foreign(folder: Path, options: CollectOptions, text: TextSpec) -> None:
    """What is there was collected by a demo, or the demo would replace somebody's work."""
    if (folder / MANIFEST).exists():
        found = Manifest.read(folder).step("collect", folder).settings
    elif (folder / PARTIAL / "run.json").exists():
        found = read_json(folder / PARTIAL / "run.json").get("settings", {})
    else:
        return
    if found != collect_settings(options, replace(text, seed=found.get("text", {}).get("seed", text.seed))):
        raise InputError(f"{folder} holds a collection that is not a demo's", hint="--save-dir elsewhere")
