"""Gates that need no training: `never`, `always:l`, `random:p`. Tests and benchmarks stand on them.

AlwaysGate(num_layers=28, layer=14)      # every MLP from layer 14 on is skipped, for every token
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sedac_cli.errors import UsageError
from sedac_cli.gates.base import Gate, Guards, TokenState
from sedac_cli.gates.options import REQUIRED, Option


class NeverGate(Gate):
    """scale = 1 everywhere: the model untouched."""

    name = form = "never"
    decides = True
    summary = "every MLP runs; bit-identical to the stock model"
    trivial = True

    def rule(self, layer: int, hidden: Tensor | None, state: TokenState) -> Tensor:
        return torch.ones_like(state.may_skip)

    def holds(self, layer: int) -> bool:
        return True


class AlwaysGate(Gate):
    """scale = 0 for every layer >= `layer`."""

    name = "always"
    decides = True
    summary = "every MLP from layer l on is skipped, for every token"
    form = "always:14"
    options = (Option("layer", int, REQUIRED, "the first layer whose MLP is skipped", 0),)

    def __init__(self, num_layers: int, layer: int, guards: Guards | None = None):
        super().__init__(num_layers, guards)
        if not 0 <= layer <= num_layers:
            raise UsageError(f"always:{layer}: the model has layers 0..{num_layers - 1}")
        self.layer = layer

    def rule(self, layer: int, hidden: Tensor | None, state: TokenState) -> Tensor:
        return torch.full_like(state.may_skip, layer < self.layer)

    def holds(self, layer: int) -> bool:
        return layer != self.layer

    def parameters(self) -> dict[str, Any]:
        return {"layer": self.layer}


class RandomGate(Gate):
    """scale = 0 with probability p, an independent coin per token and layer: the control every rule must beat."""

    name = "random"
    decides = True
    summary = "each MLP of each token is skipped with probability p"
    form = "random:0.3"
    options = (Option("probability", float, REQUIRED, "chance that a token skips a layer's MLP", 0, 1),)

    def __init__(self, num_layers: int, probability: float, seed: int = 0, guards: Guards | None = None):
        super().__init__(num_layers, guards)
        if not 0.0 <= probability <= 1.0:
            raise UsageError(f"random:{probability}: a probability lies between 0 and 1")
        self.probability = probability
        self.seed = seed
        self._generator: torch.Generator | None = None

    def _coins(self, like: Tensor) -> Tensor:
        if self._generator is None or self._generator.device != like.device:
            self._generator = torch.Generator(like.device).manual_seed(self.seed)
        return torch.rand(like.shape, generator=self._generator, device=like.device)

    def rule(self, layer: int, hidden: Tensor | None, state: TokenState) -> Tensor:
        return self._coins(state.scale) >= self.probability

    def parameters(self) -> dict[str, Any]:
        return {"probability": self.probability, "seed": self.seed}
