"""The probe gates: `fixed` (one checkpoint) and `cascade` (several). Once a probe fires, the token skips to the end.

At checkpoint l a token fires when risk_l(h) < t_l; a token that has fired at any checkpoint <= l skips the MLP of layer l.

    CascadeGate(28, probes={7: p7, 14: p14}, thresholds={7: 0.8, 14: 1.3})
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from sedac_cli.errors import UsageError
from sedac_cli.gates.base import Gate, Guards, TokenState, check_layers
from sedac_cli.probes import LREProbe

BatchRule = Literal["token", "max"]


class CascadeGate(Gate):
    """latch_l = latch_{l-1} or (risk_l < t_l) at the checkpoints; scale = 0 where latched.

    batch rule `token`: each token for itself. `max`: the tokens that share a position in a batch (those one decode step
    works on) exit only if all of them would: max(risk) < t, tokens that have already exited aside.
    """

    name = "cascade"
    summary = "a probe at each checkpoint; the first whose risk is under its threshold ends all later MLPs"

    def __init__(
        self,
        num_layers: int,
        probes: dict[int, LREProbe],
        thresholds: dict[int, float],
        batch_rule: BatchRule = "token",
        guards: Guards | None = None,
    ):
        super().__init__(num_layers, guards)
        if not probes or set(probes) != set(thresholds):
            raise UsageError(f"probes for layers {sorted(probes)} but thresholds for layers {sorted(thresholds)}")
        if batch_rule not in ("token", "max"):
            raise UsageError(f"batch rule '{batch_rule}' is not known: token or max")
        check_layers(probes, num_layers, self.name)
        self.checkpoints = sorted(probes)
        self.probes = {layer: probes[layer] for layer in self.checkpoints}
        self.batch_rule = batch_rule
        self.limits = torch.tensor([float(thresholds[layer]) for layer in self.checkpoints])
        if torch.isnan(self.limits).any():
            raise UsageError("a threshold is NaN")

    @property
    def thresholds(self) -> dict[int, float]:
        return dict(zip(self.checkpoints, self.limits.tolist(), strict=True))

    def reads(self, layer: int) -> bool:
        return layer in self.probes

    def prepare(self, state: TokenState) -> None:
        state.memory["latched"] = torch.zeros_like(state.may_skip)

    def rule(self, layer: int, hidden: Tensor | None, state: TokenState) -> Tensor:
        latched = state.memory["latched"]
        if layer in self.probes:
            assert hidden is not None
            risk = self.probes[layer](hidden)
            state.memory["risk"] = risk
            fires = risk < self.limits[self.checkpoints.index(layer)]
            if self.batch_rule == "max":
                fires = _all_of_a_step(fires | latched | ~state.real, state.shape)
            latched |= fires & state.may_skip
        return (~latched).float()

    def parameters(self) -> dict[str, Any]:
        return {"checkpoints": self.checkpoints, "thresholds": self.limits.tolist(), "batch_rule": self.batch_rule}

    def to(self, device: torch.device | str) -> CascadeGate:
        self.limits = self.limits.to(device)
        self.probes = {layer: probe.to(device) for layer, probe in self.probes.items()}
        return self

    def cost_per_token(self, hidden_size: int) -> dict[int, float]:
        return {layer: 2.0 * (hidden_size + 1) * probe.rank for layer, probe in self.probes.items()}


class FixedGate(CascadeGate):
    """One probe at one layer: risk < t latches."""

    name = "fixed"
    summary = "one probe at one layer; a risk under the threshold ends all later MLPs"

    def __init__(
        self,
        num_layers: int,
        probes: dict[int, LREProbe],
        thresholds: dict[int, float],
        batch_rule: BatchRule = "token",
        guards: Guards | None = None,
    ):
        if len(probes) != 1:
            raise UsageError(f"gate 'fixed' has one checkpoint, not {len(probes)}", hint="use gate 'cascade'")
        super().__init__(num_layers, probes, thresholds, batch_rule, guards)


def _all_of_a_step(willing: Tensor, shape: tuple[int, int]) -> Tensor:
    """[B*T] -> [B*T]: True where every sequence of the batch is willing at that position."""
    return willing.view(shape).all(dim=0, keepdim=True).expand(shape).reshape(-1)
