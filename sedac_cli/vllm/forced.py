"""The gate of benchmarks and self-tests: chosen layers are off for every token, and which ones may change while the engine runs.

ForcedGate(28, off=[0, 4, 8])        # spec: forced:0/4/8, or forced:none
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sedac_cli.errors import UsageError
from sedac_cli.gates.base import Gate, Guards, TokenState, check_layers


class ForcedGate(Gate):
    """scale_l = 0 for l in `off`. The flags are a tensor, so a captured CUDA graph follows a change at its next replay."""

    name = "forced"
    decides = True
    summary = "the MLPs of the named layers are off, for every token: what a rate costs and saves, whoever decides"
    form = "forced:0/4/8"

    def __init__(self, num_layers: int, off: Sequence[int], guards: Guards | None = None):
        super().__init__(num_layers, guards)
        self.flags = torch.ones(num_layers, dtype=torch.int32)
        self.force(off)

    @classmethod
    def parse(cls, argument: str, num_layers: int, guards: Guards | None = None) -> ForcedGate:
        words = [] if argument == "none" else argument.split("/")
        if not all(word.isdigit() for word in words):
            raise UsageError(f"gate 'forced:{argument}' does not name layers", hint=f"{cls.form}, or forced:none")
        return cls(num_layers, [int(word) for word in words], guards)

    def force(self, off: Sequence[int]) -> None:
        check_layers(off, self.num_layers, "gate 'forced'")
        self.on = [layer not in off for layer in range(self.num_layers)]
        """The flags as the host knows them."""
        self.flags.copy_(torch.tensor(self.on, dtype=torch.int32))

    def rule(self, layer: int, hidden: Tensor | None, state: TokenState) -> Tensor:
        return self.flags[layer].to(state.scale.dtype).expand_as(state.scale)

    def parameters(self) -> dict[str, Any]:
        return {"off": [layer for layer, on in enumerate(self.on) if not on]}

    def to(self, device: torch.device | str) -> ForcedGate:
        self.flags = self.flags.to(device)
        return self
