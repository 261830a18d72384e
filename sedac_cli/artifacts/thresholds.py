"""`thresholds.json`: which gate, with which settings, how they were found, what they promise, and for which model.

Probe gates keep a threshold per layer and the digests of their probes; gates made by `distill` name their `gates_file` and
a limit on its scores; all others have their options in `parameters`, and neither layers nor probes.

thresholds = Thresholds.read(Path("sedac_data/thresholds.json"))
thresholds.by_layer        # {7: 0.81, 14: 1.24, 21: 1.62}
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from sedac_cli.artifacts.files import read_json, sha256_file, write_json
from sedac_cli.artifacts.manifest import ModelIdentity, Strict
from sedac_cli.errors import InputError

SCHEMA = 1
PROBED = ("fixed", "cascade", "soft")
FROM_GATES_FILE = ("learned", "cascade", "fixed", "soft", "stability")
KNOBS = ("limit", "tighten", "tau")
"""What moves the gate of a gates file: the limit on its scores, a factor on its thresholds, or the gate's own option."""


class ProbeFile(Strict):
    """A file the thresholds were found for, and its digest: a probe, or the gates and stand-ins of `distill`."""

    file: str
    sha256: str

    def verify(self, folder: Path, what: str = "probe") -> None:
        path = folder / self.file
        if not path.is_file():
            made_by = "train-probes" if what == "probe" else "distill"
            raise InputError(f"{path} is missing: the thresholds were found for it", hint=f"sedac {made_by}")
        found = sha256_file(path)
        if found != self.sha256:
            raise InputError(
                f"{path} is not the {what} these thresholds were found for: "
                f"sha256 {found[:16]}..., expected {self.sha256[:16]}...",
                hint="sedac calibrate again",
            )


class GuardSettings(Strict):
    """The fields of `gates.base.Guards`."""

    sinks: int = Field(0, ge=0)
    first: int = Field(0, ge=0)
    last: int = Field(0, ge=0)
    prefill: bool = True
    decode: bool = True


class Promise(Strict):
    """What the thresholds were made to keep. `exit-rate` targets a share of tokens and says nothing about quality;
    `none`: settings were measured, nothing is aimed at; `certified` is a bound on a loss that holds with the given confidence."""

    kind: Literal["exit-rate", "none", "certified"]
    target: dict[str, Any]
    confidence: float | None = None
    calibration_sequences: int | None = None
    bound: float | None = None
    candidates: list[dict[str, Any]] | None = None


class Thresholds(Strict):
    schema_version: int = SCHEMA
    gate: Literal["fixed", "cascade", "soft", "learned", "never", "always", "random", "stability", "entropy"]
    batch_rule: Literal["token", "max"] = "token"
    layers: list[int]
    thresholds: list[float]
    probes: dict[int, ProbeFile]
    parameters: dict[str, Any] = Field(default_factory=dict)
    """What else the gate was told (`soft`: decay, weights, floor; any: adaptive). The registry checks names and ranges."""
    gates_file: ProbeFile | None = None
    """Routers (or probes) and stand-ins; `parameters` then hold one of KNOBS."""
    guards: GuardSettings
    target_label: str
    found_by: dict[str, Any]
    promise: Promise
    model: ModelIdentity

    @field_validator("thresholds")
    @classmethod
    def _finite(cls, values: list[float]) -> list[float]:
        if any(not math.isfinite(v) or v < 0 for v in values):
            raise ValueError("thresholds are finite numbers >= 0")
        return values

    @model_validator(mode="after")
    def _one_each(self) -> Thresholds:
        if not len(self.layers) == len(self.thresholds) == len(self.probes):
            raise ValueError("layers, thresholds and probes differ in number")
        if self.layers != sorted(self.probes):
            raise ValueError(f"layers {self.layers} but probes for {sorted(self.probes)}")
        if self.gates_file is not None and self.gate not in FROM_GATES_FILE:
            raise ValueError(f"gate '{self.gate}' has no gates_file")
        if bool(self.layers) != (self.gate in PROBED and self.gates_file is None):
            raise ValueError(f"gate '{self.gate}' with {len(self.layers)} layers of probes")
        if self.gates_file is None and self.gate == "learned":
            raise ValueError("gate 'learned' needs a gates_file")
        if self.gates_file is not None and len(set(KNOBS) & set(self.parameters)) != 1:
            raise ValueError(f"a gate of a gates_file is set by one of {', '.join(KNOBS)}")
        return self

    @property
    def by_layer(self) -> dict[int, float]:
        return dict(zip(self.layers, self.thresholds, strict=True))

    @classmethod
    def read(cls, path: Path) -> Thresholds:
        document = read_json(path)
        found = document.get("schema_version") if isinstance(document, dict) else None
        if found != SCHEMA:
            raise InputError(f"{path} has schema version {found}; this sedac reads {SCHEMA}")
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the document"
            raise InputError(f"{path}: {where}: {first['msg']}") from None

    def write(self, path: Path) -> None:
        write_json(path, self.model_dump())
