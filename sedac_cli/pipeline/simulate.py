"""Play a gate over hidden states of the dense model: what it would decide, were decisions without consequences.

Text stands for the phase the gate acts in: under a gate that leaves prompts alone, for generated tokens.
Reality differs, because a skip changes every later state; `validate` measures by how much.

    outcome = simulate(gate, states, shape=(8, 512), position=position, real=real)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sedac_cli.errors import InputError
from sedac_cli.gates.base import Gate
from sedac_cli.pipeline.data import CollectedData
from sedac_cli.runtime.deep import not_learning


@dataclass
class Outcome:
    """Decisions for the real tokens of some batches: `exit_layer` and `skipped` (number of MLPs) per token."""

    exit_layer: Tensor
    skipped: Tensor
    skipped_per_layer: Tensor
    tokens: int
    again: int = 0
    """Tokens that went through the model once more (deep thinking), counted each time; nets every rate."""

    @property
    def skip_rates(self) -> list[float]:
        return ((self.skipped_per_layer.double() - self.again) / max(1, self.tokens)).tolist()

    @property
    def passes(self) -> float:
        """How often a token went through the model."""
        return 1 + self.again / max(1, self.tokens)


@torch.no_grad()
def simulate(
    gate: Gate, states: dict[int, Tensor], *, shape: tuple[int, int], position: Tensor, real: Tensor
) -> Outcome:
    """Decide layer by layer on given states; `states` holds [B*T, hidden] for every layer the gate reads. Adaptive
    thresholds are taken as they stand: they learn from what really runs."""
    state = gate.start(
        shape[0] * shape[1], real.device, shape=shape, position=position, real=real, prefill=gate.guards.prefill
    )
    skipped = torch.zeros_like(state.exit_layer)
    per_layer = torch.zeros(gate.num_layers, dtype=torch.long, device=real.device)
    with not_learning(gate):
        for layer in range(gate.num_layers):
            if gate.reads(layer) and layer not in states:
                raise InputError(
                    f"gate '{gate.name}' reads layer {layer}, whose states were not collected",
                    hint=f"collect with --layers {','.join(str(x) for x in range(gate.num_layers) if gate.reads(x))}",
                )
            gate.decide(layer, states.get(layer), state)
            skips = (state.scale == 0) & state.real
            skipped += skips
            per_layer[layer] = skips.sum()
    return Outcome(state.exit_layer[real], skipped[real], per_layer, int(real.sum()))


def simulate_collected(gate: Gate, data: CollectedData, batch_size: int) -> Outcome:
    """Play a gate over a whole collection, its sequences batched as they would be run."""
    gate.to(data.token_ids.device)
    outcomes = []
    for rows, real in sequence_batches(data.sequence_ids, batch_size):
        flat = rows.flatten()
        position = torch.arange(rows.shape[1]).expand(rows.shape).flatten()
        states = {layer: data.states[layer][flat] for layer in data.layers if gate.reads(layer)}
        outcomes.append(
            simulate(gate, states, shape=(rows.shape[0], rows.shape[1]), position=position, real=real.flatten())
        )
    return join(outcomes)


def join(outcomes: list[Outcome]) -> Outcome:
    return Outcome(
        torch.cat([o.exit_layer for o in outcomes]),
        torch.cat([o.skipped for o in outcomes]),
        torch.stack([o.skipped_per_layer for o in outcomes]).sum(dim=0),
        sum(o.tokens for o in outcomes),
        sum(o.again for o in outcomes),
    )


def sequence_batches(sequence_ids: Tensor, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    """Row numbers [B, T] and a mask [B, T] for each `batch_size` sequences, right-padded with row 0."""
    _, lengths = torch.unique_consecutive(sequence_ids, return_counts=True)
    starts = lengths.cumsum(0) - lengths
    batches = []
    for first in range(0, len(lengths), batch_size):
        length, start = lengths[first : first + batch_size], starts[first : first + batch_size]
        offset = torch.arange(int(length.max()))
        real = offset < length.unsqueeze(1)
        batches.append((torch.where(real, start.unsqueeze(1) + offset, 0), real))
    return batches
