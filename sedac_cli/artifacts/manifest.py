"""`manifest.json`: written last, it is the commit point of every step; what it does not list does not exist.

One section per step (`collect`, `train-probes`, `calibrate`), each with the files it wrote and their sha256.

    manifest = Manifest.read(folder)
    manifest.verify(folder, "collect")          # a truncated or altered file is named
"""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from sedac_cli import __version__
from sedac_cli.artifacts.files import read_json, sha256_file, write_json
from sedac_cli.errors import InputError

MANIFEST = "manifest.json"
SCHEMA = 1


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ModelIdentity(Strict):
    """Which model something was made from, precisely enough to refuse another."""

    ref: str
    revision: str | None = None
    architecture: dict[str, Any]
    config_digest: str
    tokenizer_digest: str
    dtype: str
    quantized: bool = False
    weights_sample: list[float]
    """Norms and biases: they survive quantization, but fresh models and adapters leave them alone."""
    matrix_sample: list[float] = []
    """Entries of matrices; none of a quantized model."""

    def require_same(self, other: ModelIdentity, what: str) -> None:
        """`self` made the artifact, `other` is in use; the first difference is named with both values."""
        for key, mine in self.architecture.items():
            theirs = other.architecture.get(key)
            if mine != theirs:
                raise InputError(
                    f"{what} is for another model: {key} is {mine} there ({self.ref}) and {theirs} here ({other.ref})"
                )
        if self.tokenizer_digest != other.tokenizer_digest:
            raise InputError(
                f"{what} is for another tokenizer: {self.tokenizer_digest[:12]} there, {other.tokenizer_digest[:12]} here"
            )
        for name in ("weights_sample", "matrix_sample"):
            there, here = getattr(self, name), getattr(other, name)
            if name == "matrix_sample" and not (there and here):
                continue
            if len(there) != len(here):
                raise InputError(
                    f"{what} is for another model: {len(there)} norm and bias weights in the sample there "
                    f"({self.ref}) and {len(here)} here ({other.ref})"
                )
            for mine, theirs in zip(there, here, strict=True):
                if abs(mine - theirs) > 0.02 * max(abs(mine), abs(theirs)) + 1e-4:
                    raise InputError(
                        f"{what} is for other weights of the same architecture: a weight is {mine:.5g} there "
                        f"({self.ref}) and {theirs:.5g} here ({other.ref})"
                    )


class Step(Strict):
    """What one step did: its settings, what it wrote, and a summary worth reading later."""

    command: list[str]
    settings: dict[str, Any]
    files: dict[str, str]
    summary: dict[str, Any]
    versions: dict[str, str]


class Manifest(Strict):
    schema_version: int = SCHEMA
    model: ModelIdentity
    steps: dict[str, Step]

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        path = folder / MANIFEST
        if not path.is_file():
            raise InputError(
                f"{folder} holds no {MANIFEST}: nothing was collected there, or the run did not finish",
                hint="sedac collect --save-dir " + str(folder),
            )
        document = read_json(path)
        found = document.get("schema_version") if isinstance(document, dict) else None
        if found != SCHEMA:
            raise InputError(f"{path} has schema version {found}; this sedac reads {SCHEMA}")
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            raise InputError(f"{path} is damaged at '{where}': {error.errors()[0]['msg']}") from None

    def write(self, folder: Path) -> None:
        write_json(folder / MANIFEST, self.model_dump())

    def step(self, name: str, folder: Path) -> Step:
        if name not in self.steps:
            raise InputError(f"{folder}: `sedac {name}` has not been run there", hint=f"sedac {name} first")
        return self.steps[name]

    def verify(self, folder: Path, step: str, only: list[str] | None = None) -> None:
        """Every file of a step is there and unaltered."""
        files = self.step(step, folder).files
        for name in files if only is None else only:
            path = folder / name
            if name not in files:
                raise InputError(f"{MANIFEST} in {folder} does not list {name}", hint=f"run `sedac {step}` again")
            if not path.is_file():
                raise InputError(f"{path} is missing: {MANIFEST} lists it", hint=f"run `sedac {step}` again")
            found = sha256_file(path)
            if found != files[name]:
                raise InputError(
                    f"{path} was truncated or altered: sha256 {found[:16]}..., expected {files[name][:16]}...",
                    hint=f"run `sedac {step}` again",
                )


def make_step(settings: dict[str, Any], files: dict[str, str], summary: dict[str, Any]) -> Step:
    return Step(command=["sedac", *sys.argv[1:]], settings=settings, files=files, summary=summary, versions=versions())


def versions() -> dict[str, str]:
    """Versions that can change a result."""
    found = {"sedac": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "numpy", "bitsandbytes", "datasets", "accelerate"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found
