"""`bench.json`: everything a figure can be checked by: environment, versions, command, settings and every raw sample.

write_document(folder, document); read_document(folder / "bench.json")
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sedac_cli.artifacts.files import plain, read_json, write_json
from sedac_cli.artifacts.manifest import versions
from sedac_cli.bench.backends import Backend
from sedac_cli.bench.machine import describe_machine
from sedac_cli.bench.matrix import Matrix
from sedac_cli.bench.metrics import FEWEST, LEVEL
from sedac_cli.errors import InputError

SCHEMA = 1
KIND = "sedac bench"
FILE = "bench.json"
RANDOM_WEIGHTS = (
    "RANDOM WEIGHTS: speed alone means anything; which MLPs are skipped was forced by the gate's setting, or is chance."
)


def new_document(matrix: Matrix, backend: Backend, workload: str, command: list[str], seed: int) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA,
        "kind": KIND,
        "complete": False,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "seed": seed,
        "versions": versions(),
        "machine": describe_machine(),
        "backend": backend.name,
        "subject": backend.describe(),
        "baseline": backend.baseline,
        "workload": workload,
        "matrix": plain(matrix),
        "configurations": [],
        "missed": [],
        "crashed": [],
        "random_weights": matrix.random_weights,
    }


def write_document(folder: Path, document: dict[str, Any]) -> None:
    write_json(folder / FILE, document)


def work_label(configurations: Iterable[dict[str, Any]]) -> Callable[[dict[str, Any]], str]:
    """What a cell measured, in words; with its engine where these configurations ran in more than one."""
    engines = {cell.get("engine") for configuration in configurations for cell in configuration.get("cells") or []}

    def label(cell: dict[str, Any]) -> str:
        told = str(cell.get("label", "-"))
        return f"{told}, {cell['engine']}" if len(engines) > 1 and cell.get("engine") else told

    return label


def speed_note(document: dict[str, Any]) -> str:
    """What stands under speed-ups."""
    return (
        f"Speed-up: dense wall time / own, median of pairs that ran one after the other, with the {LEVEL:.0%} interval of that "
        f"median (none of fewer than {FEWEST} pairs). A row of dense pools its runs beside all others: only pairs give a speed-up. "
        f"Dense is: {document.get('baseline', 'dense')}."
        + _power_note(document["configurations"])
        + (f" {RANDOM_WEIGHTS}" if document.get("random_weights") else "")
    )


def _power_note(configurations: Iterable[dict[str, Any]]) -> str:
    told = [found for c in configurations for cell in c.get("cells") or [] if (found := cell.get("at_power_limit"))]
    runs, of = (sum(found[key] for found in told) for key in ("runs", "of"))
    if not runs:
        return ""
    return (
        f" At the end of {runs} of {of} runs the GPU was at its power limit, which lowers its clock: the pace of the card is in those "
        "times, and another card may give other ratios."
    )


def floor_note(document: dict[str, Any]) -> str:
    """What stands under the figures of a step, with what eager `generate` took for the same, where that was measured."""
    rate = (document.get("subject") or {}).get("read_bytes_per_second")
    at = f" at the {rate / 1e12:.2f} TB/s with which this GPU reads (measured before the run)" if rate else ""
    return (
        f"Step floor: the time to read what a decode step has to read (weights of what ran, keys and values){at}. "
        "Of floor: the floor / the time the step took; 100 % is as fast as reading allows."
        + _side_note(document["configurations"])
    )


def _side_note(configurations: Iterable[dict[str, Any]]) -> str:
    told = [
        f"{aside['step_seconds'] * 1e3:.1f} ms a step in {cell['label']} ({aside['step_seconds'] / cell['floor']['took_seconds']:.1f}x)"
        for configuration in configurations
        for cell in configuration.get("cells") or []
        if (aside := cell.get("aside")) and cell.get("floor")
    ]
    return f" Side note, no baseline: eager generate() of the dense model took {', '.join(told)}." if told else ""


def read_document(path: Path) -> dict[str, Any]:
    """A finished or interrupted run; anything else is refused."""
    path = path / FILE if path.is_dir() else path
    document = read_json(path)
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise InputError(f"{path} is not a result of `sedac bench`")
    if document.get("schema_version") != SCHEMA:
        raise InputError(f"{path} has schema version {document.get('schema_version')}; this sedac reads {SCHEMA}")
    return document
