"""The soft exit (V6.1): confidence adds up from checkpoint to checkpoint and fades the MLPs out.

SoftGate(28, probes={7: p7, 14: p14}, thresholds={7: 0.8, 14: 1.3})
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sedac_cli.errors import UsageError
from sedac_cli.gates.adaptive import AdaptiveThresholds
from sedac_cli.gates.base import Guards, TokenState
from sedac_cli.gates.options import REQUIRED, Option, check_options
from sedac_cli.gates.probed import ProbeGate
from sedac_cli.probes import LREProbe


class SoftGate(ProbeGate):
    """conf_i = clamp((t_i - risk_i) / t_i, 0, 1);  C_i = g C_{i-1} + w_i conf_i, C_0 = 0, at the checkpoints;
    scale = 1 - (tanh(2C - 1) + tanh 1) / (2 tanh 1), clamped to [0, 1]; what is <= floor counts as 0.

    A threshold of 0 gives no confidence. Scale is exactly 1 at C = 0 and 0 from C = 1 on. It holds until the next
    checkpoint and may rise again there: confidence fades by g, nothing latches. Between floor and 1 the MLP runs and is
    blended with the stand-in, which saves nothing: only the floor saves work. The default floor is reached at C = 0.75.
    """

    name = "soft"
    summary = "confidence accumulates over checkpoints and scales the MLPs down; under the floor they are skipped"
    form = "soft:sedac_data/thresholds.json"
    options = (
        Option("thresholds", list, REQUIRED, "risk under which confidence begins, per checkpoint (from the file)", 0),
        Option("decay", float, 0.8, "g: what remains of the confidence at the next checkpoint", 0, 1),
        Option("weights", list, None, "w: weight of each checkpoint's confidence; 1 each unless given", 0),
        Option("floor", float, 0.2, "a scale at or below it skips the MLP", 0, 1),
    )

    def __init__(
        self,
        num_layers: int,
        probes: Mapping[int, LREProbe],
        thresholds: Mapping[int, float] | AdaptiveThresholds,
        decay: float = 0.8,
        weights: Sequence[float] | None = None,
        floor: float = 0.2,
        guards: Guards | None = None,
    ):
        super().__init__(num_layers, probes, thresholds, guards)
        given = {"decay": decay, "floor": floor} | ({} if weights is None else {"weights": weights})
        checked = check_options(given, self.options[1:], "gate 'soft'")
        self.decay: float = checked["decay"]
        self.floor = checked["floor"]
        self.weights: list[float] = checked["weights"] or [1.0] * len(self.checkpoints)
        if len(self.weights) != len(self.checkpoints):
            raise UsageError(f"gate 'soft': {len(self.weights)} weights for {len(self.checkpoints)} checkpoints")

    def prepare(self, state: TokenState) -> None:
        state.memory["confidence"] = torch.zeros_like(state.scale)

    def rule(self, layer: int, hidden: Tensor | None, state: TokenState) -> Tensor:
        total = state.memory["confidence"]
        if layer in self.probes:
            risk, limit = self.look(layer, hidden, state, reached=state.may_skip)
            confidence = torch.where(limit > 0, 1.0 - risk / limit.clamp_min(1e-30), 0.0).clamp(0.0, 1.0)
            total.mul_(self.decay).add_(confidence, alpha=self.weights[self.checkpoints.index(layer)])
        return soft_scale(total)

    def parameters(self) -> dict[str, Any]:
        return super().parameters() | {"decay": self.decay, "weights": self.weights, "floor": self.floor}


def soft_scale(total: Tensor) -> Tensor:
    """Accumulated confidence [n] -> share of the MLP that is kept [n]."""
    one = math.tanh(1.0)
    scale = (1.0 - (torch.tanh(2.0 * total - 1.0) + one) / (2.0 * one)).clamp(0.0, 1.0)
    # Rounding must neither blend an MLP of full weight nor run one of weight 1e-8.
    return torch.where(total <= 0.0, 1.0, torch.where(total >= 1.0, 0.0, scale))
