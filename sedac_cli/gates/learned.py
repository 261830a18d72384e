"""The learned gate: a router per layer reads the MLP's own input and says whether this token needs this MLP.

The routers of all layers share one scale, so a single threshold moves the whole model along its curve of skip against
quality: one artifact serves every budget.

    gate = LearnedGate(28, routers, threshold=0.3)
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from sedac_cli.errors import UsageError
from sedac_cli.gates.base import Gate, Guards, TokenState, check_layers


class Router(nn.Module):
    """skip score = w . layer_norm(x) + c, float32; the norm has no weights of its own."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [...]; high means the MLP can be skipped."""
        x = x.float()
        return nn.functional.layer_norm(x, x.shape[-1:]) @ self.weight.float() + self.bias.float()

    def flops(self) -> float:
        return 8.0 * self.weight.numel()


class LearnedGate(Gate):
    """scale_l = 0 where router_l(x_l) > threshold, x_l the input of the MLP of layer l; layers without router run."""

    name = "learned"
    summary = "a router per layer on the MLP's input, trained together with stand-ins by `sedac distill`"
    looks_at: Literal["entry", "mlp"] = "mlp"

    def __init__(self, num_layers: int, routers: dict[int, Router], threshold: float, guards: Guards | None = None):
        super().__init__(num_layers, guards)
        if not routers:
            raise UsageError("gate 'learned' without routers")
        if threshold != threshold:
            raise UsageError("the threshold of gate 'learned' is NaN")
        check_layers(routers, num_layers, self.name)
        self.routers = dict(sorted(routers.items()))
        self.limit = torch.tensor(float(threshold))

    def reads(self, layer: int) -> bool:
        return layer in self.routers

    def rule(self, layer: int, hidden: Tensor | None, state: TokenState) -> Tensor:
        if layer not in self.routers:
            return torch.ones_like(state.scale)
        assert hidden is not None
        score = self.routers[layer](hidden)
        state.memory["score"] = score
        return (score <= self.limit).float()

    def parameters(self) -> dict[str, Any]:
        return {"layers": list(self.routers), "threshold": float(self.limit)}

    def to(self, device: torch.device | str) -> LearnedGate:
        self.limit = self.limit.to(device)
        self.routers = {layer: router.to(device) for layer, router in self.routers.items()}
        return self

    def cost_per_token(self, hidden_size: int) -> dict[int, float]:
        return {layer: router.flops() for layer, router in self.routers.items()}
