"""A gate that decides about a whole span of layers: who is away when the span begins is away until it ends.

Any gate that looks at layer entries can say who: SpanGate(CascadeGate(...), layers=(18, 19, 20)) asks it up to layer 18,
where a latch that has fired, a coin, or a coded rule decides; its answers about deeper layers are not asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sedac_cli.errors import UsageError
from sedac_cli.gates.base import Gate, TokenState, check_layers


@dataclass
class SpanState(TokenState):
    inner: TokenState | None = None


class SpanGate(Gate):
    """scale = 0 in the layers of the span where the inner gate's scale at the first of them is 0; 1 elsewhere."""

    name = "ghost"
    decides = True
    summary = "tokens skip whole layers, attention included; ghost K and V stand for them"
    form = "ghost:sedac_data/ghost_kv.pth@random:0.3"

    def __init__(self, inner: Gate, layers: tuple[int, ...]):
        super().__init__(inner.num_layers, inner.guards)
        if inner.looks_at != "entry":
            raise UsageError(
                f"gate '{inner.name}' reads the MLP's input: it cannot say who skips whole layers",
                hint="a gate that looks at layer entries: cascade, fixed, soft, stability, entropy, random",
            )
        check_layers(layers, inner.num_layers, "the skipped layers")
        self.inner, self.layers = inner, layers

    def reads(self, layer: int) -> bool:
        return layer <= self.layers[0] and self.inner.reads(layer)

    def start(self, tokens: int, device: torch.device | str, **more: Any) -> TokenState:
        state = super().start(tokens, device, **more)
        return SpanState(**vars(state), inner=self.inner.start(tokens, device, **more))

    def decide(self, layer: int, hidden: Tensor | None, state: TokenState) -> None:
        assert isinstance(state, SpanState)
        assert state.inner is not None
        if layer <= self.layers[0]:
            self.inner.decide(layer, hidden, state.inner)
        if layer not in self.layers:
            state.scale.fill_(1.0)
            return
        if layer == self.layers[0]:
            state.memory["away"] = state.inner.scale == 0
        away = state.memory["away"]
        state.scale.copy_((~away).float())
        state.exit_layer.masked_fill_(away & (state.exit_layer > layer), layer)

    def parameters(self) -> dict[str, Any]:
        return {"layers": list(self.layers), "who": self.inner.name, **self.inner.parameters()}

    def to(self, device: torch.device | str) -> SpanGate:
        self.inner.to(device)
        return self

    def cost_per_token(self, hidden_size: int) -> dict[int, float]:
        return {x: flops for x, flops in self.inner.cost_per_token(hidden_size).items() if x <= self.layers[0]}
