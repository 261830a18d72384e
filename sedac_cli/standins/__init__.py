"""Stand-ins: what a skipped MLP returns instead.

A stand-in maps the MLP's input rows to output rows; `None` in its place means zero (the branch adds nothing).
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class StandIn(Protocol):
    """One object for the whole model; `rows(layer, x)` is [n, hidden] -> [n, hidden]."""

    def rows(self, layer: int, x: Tensor) -> Tensor | None: ...

    def cost_per_token(self, layer: int) -> float: ...


class ZeroStandIn:
    """The MLP's branch adds nothing."""

    def rows(self, layer: int, x: Tensor) -> Tensor | None:
        return None

    def cost_per_token(self, layer: int) -> float:
        return 0.0
