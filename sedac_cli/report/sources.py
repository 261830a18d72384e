"""What a run folder holds: every kind of result, read tolerantly. What is absent or damaged is said, never guessed.

run = read_run(Path("sedac_data")); run.missing      # [("the curve ...", "sedac distill ...")]
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sedac_cli.artifacts.files import read_json, sha256_file
from sedac_cli.artifacts.gates_file import GatesFile
from sedac_cli.artifacts.manifest import MANIFEST, Manifest
from sedac_cli.artifacts.thresholds import Thresholds
from sedac_cli.config import SHAPE
from sedac_cli.errors import InputError, SedacError

THRESHOLDS, VALIDATE, BENCH, TOKENS, RUN, REPORT = (
    "thresholds.json", "validate.json", "bench.json", "tokens.json", "run.json", "report.html",
)  # fmt: skip


NEEDS: dict[str, list[tuple[str | int, ...]]] = {
    "report": [("report", "measures", "skip_ratio"), ("report", "intervals"), ("report", "model", "ref")],
    "configurations": [("configurations", 0, "name")],
    "tokens": [("num_layers",), ("tokens", 0, "skipped"), ("tokens", 0, "layers")],
}
"""What a file must have at least to be shown."""


@dataclass
class RunData:
    folder: Path
    manifest: Manifest | None = None
    thresholds: Thresholds | None = None
    validations: dict[str, dict[str, Any]] = field(default_factory=dict)
    """`validate*.json` by file name; `validate.json` first."""
    gates: dict[str, GatesFile] = field(default_factory=dict)
    bench: dict[str, Any] | None = None
    tokens: dict[str, Any] | None = None
    steps: list[str] = field(default_factory=list)
    """What `sedac run` or `sedac demo` did here, as command lines without the `sedac`."""
    problems: list[str] = field(default_factory=list)

    @property
    def validation(self) -> dict[str, Any] | None:
        return next(iter(self.validations.values()), None)

    @property
    def configurations(self) -> list[dict[str, Any]]:
        """Of the benchmark; none without one."""
        return [c for c in (self.bench or {}).get("configurations") or [] if isinstance(c, dict)]

    @property
    def model_ref(self) -> str | None:
        """The model the run is about, by whichever file names it."""
        if self.manifest is not None:
            return self.manifest.model.ref
        if self.thresholds is not None:
            return self.thresholds.model.ref
        for gates in self.gates.values():
            return gates.model.ref
        if self.validation is not None:
            return str(self.validation["report"]["model"]["ref"])
        if self.bench is not None:
            return str(self.bench.get("matrix", {}).get("base_model") or "") or None
        return None

    @property
    def gate_spec(self) -> str | None:
        """The gate of the run as `--gate` takes it: what was calibrated, or what was distilled."""
        if self.thresholds is not None:
            return f"{self.thresholds.gate}:{self.folder / THRESHOLDS}"
        for name, gates in self.gates.items():
            return f"{gates.kind}:{self.folder / name}"
        return None

    @property
    def missing(self) -> list[tuple[str, str]]:
        """(what the page would show, the command that makes it). Of random weights nothing but speed could be shown."""
        here, model = self.folder, self.model_ref or "MODEL"
        if model.startswith(SHAPE):
            return []
        found = []
        if self.thresholds is None and not self.gates:
            found.append(
                ("a gate and what it promises", f"sedac calibrate --data-dir {here} --max-harm agreement=0.98")
            )
        if self.validation is None:
            found.append(("quality with the skips in force", f"sedac validate --model {model} --data-dir {here}"))
        if not self.gates:
            found.append(
                (
                    "a whole curve of skip against quality",
                    f"sedac distill --model {model} --save {here / 'sedac_gates.pth'}",
                )
            )
        if self.bench is None:
            gate = self.gate_spec or "GATE"
            found.append(("measured speed", f"sedac bench --model {model} --gates {gate} --save-dir {here}"))
        if self.tokens is None:
            found.append(("the text, token by token", f"sedac report {here} --model {model}"))
        return found


def read_run(folder: Path) -> RunData:
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}", hint="sedac report takes the folder of a run, such as sedac_data")
    run = RunData(folder)
    if (folder / MANIFEST).is_file():
        run.manifest = _tolerant(run, MANIFEST, lambda: Manifest.read(folder))
    if (folder / THRESHOLDS).is_file():
        run.thresholds = _tolerant(run, THRESHOLDS, lambda: Thresholds.read(folder / THRESHOLDS))
    for path in sorted(folder.glob("validate*.json"), key=lambda p: (p.name != VALIDATE, p.name)):
        found = _document(run, path, "report")
        if found is not None:
            run.validations[path.name] = found
    for path in sorted(folder.glob("*gates*.pth")):
        gates = _tolerant(run, path.name, lambda path=path: GatesFile.read(path))  # type: ignore[misc]
        if gates is not None:
            run.gates[path.name] = gates
    for path in (folder / BENCH, folder / "bench" / BENCH):
        if path.is_file() and run.bench is None:
            run.bench = _document(run, path, "configurations")
    if (folder / TOKENS).is_file():
        run.tokens = _document(run, folder / TOKENS, "tokens")
    if (folder / RUN).is_file():
        run.steps = _tolerant(run, RUN, lambda: _steps(read_json(folder / RUN))) or []
    anything = (run.manifest, run.thresholds, run.validation, run.bench, run.tokens, *run.gates.values())
    if all(x is None for x in anything):
        raise InputError(
            f"{folder} holds nothing to report" + (f": {run.problems[0]}" if run.problems else ""),
            hint="sedac demo, or sedac run CONFIG.yaml, makes a folder to report on",
        )
    return run


def _steps(document: dict[str, Any]) -> list[str]:
    """The report itself may be the step that is being made: it has no record yet."""
    done = [(name, step["options"]["argv"]) for name, step in document["steps"].items() if step.get("finished")]
    return [shlex.join([name, *argv]) for name, argv in done if name != "report"]


def gate_sources(run: RunData) -> dict[str, str]:
    """Digests of the files the gate comes from: whether `tokens.json` is still about this gate."""
    names = [THRESHOLDS] if run.thresholds is not None else list(run.gates)[:1]
    return {name: sha256_file(run.folder / name) for name in names}


def _tolerant(run: RunData, name: str, read: Any) -> Any:
    try:
        return read()
    except SedacError as error:
        run.problems.append(error.message)
    except Exception as error:  # damaged in a way that its reader did not foresee: still no reason to show nothing
        run.problems.append(f"{name} cannot be read: {type(error).__name__}: {error}")
    return None


def _document(run: RunData, path: Path, needs: str) -> dict[str, Any] | None:
    found = _tolerant(run, path.name, lambda: read_json(path))
    if found is None:
        return None
    try:
        for keys in NEEDS[needs]:
            part = found
            for key in keys:
                part = part[key]
    except (KeyError, TypeError, IndexError):
        run.problems.append(f"{path.name} lacks '{'.'.join(map(str, keys))}': not what sedac writes")
        return None
    return found
