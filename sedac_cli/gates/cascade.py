"""The probe gates: `fixed` (one checkpoint) and `cascade` (several). Once a probe fires, the token skips to the end.

At checkpoint l a token fires when risk_l(h) < t_l; a token that has fired at any checkpoint <= l skips the MLP of layer l.

    CascadeGate(28, probes={7: p7, 14: p14}, thresholds={7: 0.8, 14: 1.3})
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from sedac_cli.errors import UsageError
from sedac_cli.gates.adaptive import AdaptiveThresholds
from sedac_cli.gates.base import Guards, TokenState
from sedac_cli.gates.options import REQUIRED, Option
from sedac_cli.gates.probed import ProbeGate
from sedac_cli.probes import LREProbe

BatchRule = Literal["token", "max"]


class CascadeGate(ProbeGate):
    """latch_l = latch_{l-1} or (risk_l < t_l) at the checkpoints; scale = 0 where latched.

    batch rule `token`: each token for itself. `max`: the tokens that share a position in a batch (those one decode step
    works on) exit only if all of them would: max(risk) < t, tokens that have already exited aside.
    """

    name = "cascade"
    decides = True
    summary = "a probe at each checkpoint; the first whose risk is under its threshold ends all later MLPs"
    form = "cascade:sedac_data/thresholds.json"
    options = (
        Option("thresholds", list, REQUIRED, "risk under which a token exits, per checkpoint (from the file)", 0),
        Option(
            "batch_rule", str, "token", "max: a decode step exits only if all its tokens do", choices=("token", "max")
        ),
    )

    def __init__(
        self,
        num_layers: int,
        probes: Mapping[int, LREProbe],
        thresholds: Mapping[int, float] | AdaptiveThresholds,
        batch_rule: BatchRule = "token",
        guards: Guards | None = None,
    ):
        super().__init__(num_layers, probes, thresholds, guards)
        if batch_rule not in ("token", "max"):
            raise UsageError(f"batch rule '{batch_rule}' is not known: token or max")
        self.batch_rule = batch_rule

    def prepare(self, state: TokenState) -> None:
        state.memory["latched"] = torch.zeros_like(state.may_skip)

    def rule(self, layer: int, hidden: Tensor | None, state: TokenState) -> Tensor:
        latched = state.memory["latched"]
        if layer in self.probes:
            risk, limit = self.look(layer, hidden, state, reached=state.may_skip & ~latched)
            fires = risk < limit
            if self.batch_rule == "max":
                fires = _all_of_a_step(fires | latched | ~state.real, state.shape)
            latched |= fires & state.may_skip
        return ~latched

    def parameters(self) -> dict[str, Any]:
        return super().parameters() | {"batch_rule": self.batch_rule}


class FixedGate(CascadeGate):
    """One probe at one layer: risk < t latches."""

    name = "fixed"
    decides = True
    summary = "one probe at one layer; a risk under the threshold ends all later MLPs"
    form = "fixed:sedac_data/thresholds.json"

    def __init__(
        self,
        num_layers: int,
        probes: Mapping[int, LREProbe],
        thresholds: Mapping[int, float] | AdaptiveThresholds,
        batch_rule: BatchRule = "token",
        guards: Guards | None = None,
    ):
        if len(probes) != 1:
            raise UsageError(f"gate 'fixed' has one checkpoint, not {len(probes)}", hint="use gate 'cascade'")
        super().__init__(num_layers, probes, thresholds, batch_rule, guards)


def _all_of_a_step(willing: Tensor, shape: tuple[int, int]) -> Tensor:
    """[B*T] -> [B*T]: True where every sequence of the batch is willing at that position."""
    return willing.view(shape).all(dim=0, keepdim=True).expand(shape).reshape(-1)
