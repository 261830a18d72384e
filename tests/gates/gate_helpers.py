"""Probes and lenses whose answer the test chooses, and a pass by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sedac_cli.gates.base import Gate
from sedac_cli.probes import LREProbe


class Reads(nn.Module):
    """A probe whose risk is one column of the state."""

    rank = 1

    def __init__(self, column: int = 0):
        super().__init__()
        self.column = column

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden[..., self.column].float()


class ColumnLens:
    """A lens whose entropy is the first column of the state."""

    def __call__(self, layer: int, hidden: Tensor) -> Tensor:
        return hidden[:, 0].float()

    def cost_per_token(self, layer: int, hidden_size: int) -> float:
        return 7.0

    def to(self, device):
        return self

    def layers(self):
        return None


def by_hand(gate: Gate, states: list[Tensor], **start) -> tuple[Tensor, Tensor]:
    """(scale [layers, tokens], exit layer [tokens]); the gate gets no state at layers it does not read."""
    state = gate.start(states[0].shape[0], "cpu", **start)
    scales = []
    for layer, hidden in enumerate(states):
        gate.decide(layer, hidden if gate.reads(layer) else None, state)
        scales.append(state.scale.clone())
    return torch.stack(scales), state.exit_layer


def random_probe(hidden_size: int, seed: int = 0) -> LREProbe:
    torch.manual_seed(seed)
    probe = LREProbe(hidden_size, rank=4).eval().requires_grad_(False)
    nn.init.normal_(probe.head.weight)
    return probe


def random_states(layers: int, tokens: int, hidden_size: int, seed: int = 0, step: float = 0.4) -> list[Tensor]:
    """A random walk, so that neighbouring layers resemble each other."""
    generator = torch.Generator().manual_seed(seed)
    states = [torch.randn(tokens, hidden_size, generator=generator)]
    for _ in range(layers - 1):
        states.append(states[-1] + step * torch.randn(tokens, hidden_size, generator=generator))
    return states
