"""Steps that are run once: one whose options, inputs and results are what they were is kept, any other is done again.

Always true: `run.json` says of every step what it was told, the digests of what it read and wrote, and what it found. A step
counts as finished only when that is written. A folder that another kind of run wrote is left alone.

    outcomes = run_steps(Path("sedac_run"), steps, owner="run", say=print)
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sedac_cli import __version__
from sedac_cli.artifacts.files import folder_lock, make_folder, plain, read_json, sha256_file, write_json
from sedac_cli.artifacts.manifest import MANIFEST
from sedac_cli.errors import InputError, UsageError, did_you_mean
from sedac_cli.pipeline.collect import PARTIAL

STATE, LOCK = "run.json", ".run"
SCHEMA = 1


@dataclass(frozen=True)
class Step:
    """`outputs` are patterns in the folder; `needs` are earlier steps whose outputs are read; `sources` are files elsewhere.
    `do(resume)` returns what was found and, if a limit was missed, which."""

    name: str
    options: dict[str, Any]
    needs: tuple[str, ...]
    outputs: tuple[str, ...]
    sources: tuple[Path, ...]
    do: Callable[[bool], tuple[dict[str, Any], str | None]]


@dataclass(frozen=True)
class Outcome:
    name: str
    kept: bool
    seconds: float
    result: dict[str, Any]
    missed: str | None


def run_steps(
    folder: Path,
    steps: Sequence[Step],
    owner: str,
    force: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> list[Outcome]:
    """Every step in turn. A missed limit does not end the run; what fails does, and keeps what was finished."""
    names = [step.name for step in steps]
    for name in force:
        if name not in names:
            raise UsageError(
                f"--force: there is no step '{name}' here.{did_you_mean(name, names)}",
                hint="steps: " + ", ".join(names),
            )
    _State.open(folder, owner)  # somebody else's folder is refused before anything is written there
    make_folder(folder / LOCK)
    with folder_lock(folder / LOCK):
        state = _State.open(folder, owner)
        outcomes = []
        for number, step in enumerate(steps, 1):
            title = f"[{number}/{len(steps)}] {step.name}"
            digest = state.digest(step)
            if step.name not in force and state.is_finished(step, digest):
                say(f"{title}: kept, nothing it depends on has changed")
                outcomes.append(state.outcome(step.name, kept=True))
                continue
            say(f"{title} ...")
            resume = state.begin(step.name, digest) and step.name not in force
            began = time.monotonic()
            result, missed = step.do(resume)
            state.finish(step, digest, time.monotonic() - began, result, missed)
            if missed:
                say(f"{title}: {missed}")
            outcomes.append(state.outcome(step.name, kept=False))
        return outcomes


class _State:
    def __init__(self, folder: Path, document: dict[str, Any]):
        self.folder, self.document = folder, document
        self.steps: dict[str, Any] = document["steps"]
        self.known: dict[str, list[Any]] = document["files"]

    @classmethod
    def open(cls, folder: Path, owner: str) -> _State:
        path = folder / STATE
        if path.exists():
            document = read_json(path)
            if not isinstance(document, dict) or document.get("schema_version") != SCHEMA:
                raise InputError(f"{path} is not the state of a run of this sedac", hint="another --save-dir")
            if document.get("owner") != owner:
                raise InputError(
                    f"{folder} holds what `sedac {document.get('owner')}` made", hint="--save-dir elsewhere"
                )
            return cls(folder, document)
        if (folder / MANIFEST).exists() or (folder / PARTIAL).exists():
            raise InputError(f"{folder} holds a collection that is not a {owner}'s", hint="--save-dir elsewhere")
        return cls(folder, {"schema_version": SCHEMA, "owner": owner, "steps": {}, "files": {}})

    def digest(self, step: Step) -> str:
        """Of everything that can change what the step does."""
        inputs = {name: self.steps.get(name, {}).get("outputs") for name in step.needs}
        sources = {str(path): self.fingerprint(path) for path in sorted(_files(step.sources))}
        told = {"sedac": __version__, "options": plain(step.options), "inputs": inputs, "sources": sources}
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()

    def fingerprint(self, path: Path) -> str:
        """sha256; a file of the same size and time as when it was last read is not read again."""
        stat = path.stat()
        known = self.known.get(str(path))
        if known is None or known[:2] != [stat.st_size, stat.st_mtime_ns]:
            known = self.known[str(path)] = [stat.st_size, stat.st_mtime_ns, sha256_file(path)]
        return str(known[2])

    def is_finished(self, step: Step, digest: str) -> bool:
        recorded = self.steps.get(step.name)
        if recorded is None or not recorded["finished"] or recorded["digest"] != digest:
            return False
        return self._outputs(step) == recorded["outputs"]

    def _outputs(self, step: Step) -> dict[str, str]:
        found = sorted({path for pattern in step.outputs for path in self.folder.glob(pattern)})
        return {path.name: self.fingerprint(path) for path in found}

    def begin(self, name: str, digest: str) -> bool:
        """Whether this very step was begun before and not finished: then it may go on where it was."""
        recorded = self.steps.get(name)
        again = recorded is not None and not recorded["finished"] and recorded["digest"] == digest
        self.steps[name] = {"finished": False, "digest": digest, "outputs": {}}
        self._write()
        return again

    def finish(self, step: Step, digest: str, seconds: float, result: dict[str, Any], missed: str | None) -> None:
        self.steps[step.name] = {
            "finished": True, "digest": digest, "options": plain(step.options), "outputs": self._outputs(step),
            "seconds": seconds, "missed": missed, "result": result,
        }  # fmt: skip
        self._write()

    def outcome(self, name: str, kept: bool) -> Outcome:
        recorded = self.steps[name]
        return Outcome(name, kept, recorded["seconds"], recorded["result"], recorded["missed"])

    def _write(self) -> None:
        write_json(self.folder / STATE, self.document)


def _files(sources: Sequence[Path]) -> list[Path]:
    return [
        file for path in sources for file in ([path] if path.is_file() else sorted(path.rglob("*"))) if file.is_file()
    ]
