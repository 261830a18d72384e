"""`sedac_gates.pth`: routers (or probes) and stand-ins of one distillation, with the limits that give each budget.

gates = GatesFile.read(Path("sedac_data/sedac_gates.pth"))
gates.limit_for(0.25)           # the threshold that skips a quarter of all MLPs
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sedac_cli.artifacts.manifest import ModelIdentity
from sedac_cli.artifacts.tensors import load_tensors, save_tensors
from sedac_cli.errors import InputError, UsageError

SCHEMA = 1
KINDS = ("learned", "cascade", "fixed", "soft", "stability", "entropy", "always", "random")


@dataclass(frozen=True)
class GatesFile:
    """`routers` and `standins` are state dicts by layer; `curve` rows hold share, limit and measured quality.

    `decided_by`: a thresholds document, of the gate that the stand-ins were trained for and that stayed as it was. Its
    probes are in `routers`, and the one row of `curve` has no limit.
    """

    kind: str
    model: ModelIdentity
    sinks: int
    routers: dict[int, dict[str, Tensor]]
    standins: dict[int, dict[str, Tensor]]
    curve: list[dict[str, float]]
    recipe: dict[str, Any] = field(default_factory=dict)
    decided_by: dict[str, Any] | None = None

    @property
    def layers(self) -> list[int]:
        return sorted(self.standins)

    def limit_for(self, share: float) -> float:
        """The limit for a share of skipped MLPs, between the measured rows of the curve."""
        rows = sorted(self.curve, key=lambda row: row["share"])
        if not rows[0]["share"] <= share <= rows[-1]["share"]:
            raise UsageError(
                f"a skip share of {share} is outside what was measured: "
                f"{rows[0]['share']:.2f} .. {rows[-1]['share']:.2f}"
            )
        for low, high in pairwise(rows):
            if low["share"] <= share <= high["share"]:
                part = (share - low["share"]) / max(high["share"] - low["share"], 1e-9)
                return low["limit"] + part * (high["limit"] - low["limit"])
        return rows[0]["limit"]

    def write(self, path: Path) -> str:
        return save_tensors(
            path,
            {
                "schema_version": SCHEMA,
                "kind": self.kind,
                "model": self.model.model_dump(),
                "sinks": self.sinks,
                "routers": self.routers,
                "standins": self.standins,
                "curve": self.curve,
                "recipe": self.recipe,
                "decided_by": self.decided_by,
            },
        )

    @classmethod
    def read(cls, path: Path) -> GatesFile:
        found = load_tensors(path)
        if not isinstance(found, dict) or found.get("schema_version") != SCHEMA:
            raise InputError(f"{path} is not a sedac_gates file of schema {SCHEMA}", hint="sedac distill makes one")
        if found.get("kind") not in KINDS:
            raise InputError(f"{path}: kind '{found.get('kind')}' is not one of {', '.join(KINDS)}")
        for name in ("routers", "standins"):
            for layer, state in found[name].items():
                for key, value in state.items():
                    if not torch.isfinite(value).all():
                        raise InputError(f"{path}: {name} of layer {layer} hold NaN or infinite values in '{key}'")
        return cls(
            kind=found["kind"],
            model=ModelIdentity.model_validate(found["model"]),
            sinks=found["sinks"],
            routers=found["routers"],
            standins=found["standins"],
            curve=found["curve"],
            recipe=found["recipe"],
            decided_by=found.get("decided_by"),
        )
