"""The stability gate (V7): a token whose state has stopped turning from layer to layer needs no more MLPs. No training.

StabilityGate(28, tau=0.95, k=3, min_layer=4)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sedac_cli.gates.base import Gate, Guards, TokenState, check_layers
from sedac_cli.gates.options import Option, check_options

GUARD_OPTIONS = (
    Option("sinks", int, 0, "first positions of a sequence that never skip", 0),
    Option("first", int, 0, "first layers that always run", 0),
    Option("last", int, 0, "last layers that always run", 0),
)


class StabilityGate(Gate):
    """s_l = cos(h_l, h_{l-1}) of the states entering layers l and l-1, per token, in float32;
    run_l = run_{l-1} + 1 if s_l > tau else 0;  latch_l = latch_{l-1} or (run_l >= k and l >= min_layer).

    Each token stands for itself: V7 averaged the sequence, and one steady token could then carry an unsteady one along.
    """

    name = "stability"
    decides = True
    summary = "k layers in a row whose entering states have cosine > tau end all later MLPs; needs no training"
    form = "stability:tau=0.95,k=3,min_layer=4"
    options = (
        Option("tau", float, 0.95, "cosine above which a layer counts as steady", -1, 1),
        Option("k", int, 3, "steady layers in a row that end the MLPs", 1),
        Option("min_layer", int, 4, "first layer whose MLP may be skipped", 1),
        *GUARD_OPTIONS,
    )

    def __init__(
        self, num_layers: int, tau: float = 0.95, k: int = 3, min_layer: int = 4, guards: Guards | None = None
    ):
        super().__init__(num_layers, guards)
        checked = check_options({"tau": tau, "k": k, "min_layer": min_layer}, self.options, f"gate '{self.name}'")
        check_layers([min_layer], num_layers, f"gate '{self.name}' min_layer")
        self.tau: float = checked["tau"]
        self.k: int = checked["k"]
        self.min_layer: int = checked["min_layer"]

    def reads(self, layer: int) -> bool:
        """A run that counts at min_layer began k layers before it; nothing earlier matters."""
        return layer >= self.min_layer - self.k

    def holds(self, layer: int) -> bool:
        return not self.reads(layer)

    def prepare(self, state: TokenState) -> None:
        state.memory["latched"] = torch.zeros_like(state.may_skip)
        state.memory["run"] = torch.zeros_like(state.exit_layer)

    def rule(self, layer: int, hidden: Tensor | None, state: TokenState) -> Tensor:
        latched, run = state.memory["latched"], state.memory["run"]
        if not self.reads(layer):
            return ~latched
        assert hidden is not None
        if "previous" in state.memory:
            previous = state.memory["previous"]
            steady = cosine(hidden, previous) > self.tau
            run.copy_(torch.where(steady, run + 1, 0))
            if layer >= self.min_layer:
                latched |= (run >= self.k) & state.may_skip
            previous.copy_(hidden)
        else:
            state.memory["previous"] = hidden.clone()  # a runtime may add the next layers into `hidden` in place
        return ~latched

    def parameters(self) -> dict[str, Any]:
        return {"tau": self.tau, "k": self.k, "min_layer": self.min_layer}

    def cost_per_token(self, hidden_size: int) -> dict[int, float]:
        """Three inner products where there is a previous state."""
        first = max(0, self.min_layer - self.k)
        return dict.fromkeys(range(first + 1, self.num_layers), 6.0 * hidden_size)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """[n, H] x 2 -> [n], in [-1, 1]; 0 where a vector is zero."""
    return torch.cosine_similarity(a.float(), b.float(), dim=-1, eps=1e-12).clamp(-1.0, 1.0)
