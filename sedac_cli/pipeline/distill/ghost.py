"""Distil ghost K and V: first the closed-form linear map, then cosine + MSE to the dense model's own, then KL end to end.

The regression teaches what the dense model would have had there; the end-to-end part runs the model with tokens away, by
the runtime that really skips, and teaches what those that follow need of it.

    trainer = GhostTrainer(loaded, windows, GhostOptions(layers=(18, 19, 20, 21), gate="random:0.3", steps=500), gate)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sedac_cli.errors import UsageError
from sedac_cli.gates.base import Gate
from sedac_cli.gates.simple import AlwaysGate, RandomGate
from sedac_cli.gates.span import SpanGate
from sedac_cli.models import LoadedModel
from sedac_cli.pipeline import Progress, quiet_progress
from sedac_cli.pipeline.distill.loop import Loop, LoopOptions
from sedac_cli.pipeline.distill.loss import kl_loss
from sedac_cli.pipeline.distill.scan import Moments, solve
from sedac_cli.pipeline.world import World
from sedac_cli.runtime.kv import check_attention, recording
from sedac_cli.runtime.skip import SkipRun, skipping
from sedac_cli.standins.ghost import GhostBatch, GhostKV, GhostMap, normed
from sedac_cli.structure import Decoder

RIDGE = 1e-4


@dataclass(frozen=True)
class GhostOptions(LoopOptions):
    """`layers` are skipped whole by the tokens that `gate` lets go; `end_to_end` is the share of the training that is KL."""

    layers: tuple[int, ...] = ()
    gate: str = "random:0.3"
    rank: int = 48
    end_to_end: float = 0.7
    rival: bool = False
    """Train stand-ins of MLPs too, skipped by the same gate at equal cost and trained as long: what ghosts must beat."""
    sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layers or list(self.layers) != list(range(self.layers[0], self.layers[-1] + 1)):
            raise UsageError(f"--skip-layers: {self.layers} is not a run of layers", hint="--skip-layers 18..21")
        if self.layers[0] < 1:
            raise UsageError("--skip-layers: the first layer cannot be skipped whole: it is where tokens come from")
        if not 0 <= self.end_to_end <= 1:
            raise UsageError(f"--end-to-end: {self.end_to_end} is not between 0 and 1")


@torch.no_grad()
def capture(decoder: Decoder, layers: tuple[int, ...], ids: Tensor) -> GhostBatch:
    """What the dense model makes of these tokens [B, T], token by token."""
    with recording(decoder, layers) as seen:
        decoder.last_hidden(ids)
    return GhostBatch(
        entering=seen[layers[0]].entering.flatten(0, 1),
        k={x: seen[x].key.flatten(0, 1) for x in layers},
        v={x: seen[x].value.flatten(0, 1) for x in layers},
        leaving=seen[layers[-1]].leaving.flatten(0, 1),
    )


def ghost_batches(decoder: Decoder, layers: tuple[int, ...], batches: Iterable[Tensor]) -> Iterator[GhostBatch]:
    """For `GhostKV.train_epoch`: batches of token ids -> what it learns from."""
    for ids in batches:
        yield capture(decoder, layers, ids)


@torch.no_grad()
def linear_start(
    decoder: Decoder, layers: tuple[int, ...], batches: Iterable[Tensor], rank: int = 48, world: World | None = None
) -> GhostKV:
    """Ghost K and V that are the best linear maps (ridge) on these token ids; `rank` is what training may add."""
    heads, head_dim = check_attention(decoder, layers)
    size, device = decoder.hidden_size, decoder.device
    ghost = GhostKV(layers, size, heads, head_dim, rank).to(device)
    moments = {layer: Moments.of(size, 2 * heads * head_dim, device) for layer in layers}
    leaving = Moments.of(size, size, device)
    for batch in ghost_batches(decoder, layers, batches):
        n = normed(batch.entering.float())
        for layer in layers:
            moments[layer].add(n, torch.cat([batch.k[layer].flatten(1), batch.v[layer].flatten(1)], dim=1))
        leaving.add(n, batch.leaving - batch.entering)
    for layer in layers:
        _set(ghost.maps[str(layer)], moments[layer], world)
    _set(ghost.leaving, leaving, world)
    return ghost.requires_grad_(False)


def _set(part: nn.Module, moments: Moments, world: World | None) -> None:
    assert isinstance(part, GhostMap)
    moments.joined(world or World())
    solution = solve(moments, RIDGE)
    part.weight.copy_(solution[:-1].T)
    part.bias.copy_(solution[-1])


class GhostTrainer(Loop):
    figures = ("loss", "away")

    def __init__(
        self, loaded: LoadedModel, windows: Tensor, options: GhostOptions, gate: Gate, state_file: Path | None = None,
        progress: Progress = quiet_progress, world: World | None = None,
    ):  # fmt: skip
        super().__init__(loaded, windows, options, state_file, progress, world)
        if options.layers[-1] >= self.decoder.num_layers:
            raise UsageError(
                f"--skip-layers: layer {options.layers[-1]} does not exist, the model has layers "
                f"0..{self.decoder.num_layers - 1}"
            )
        self.options = options
        self.chance = gate.probability if isinstance(gate, RandomGate) else None
        # A coin is tossed here, for the whole batch of all processes; who tosses it elsewhere is the gate.
        inner = gate if self.chance is None else AlwaysGate(gate.num_layers, options.layers[0], gate.guards)
        self.gate = SpanGate(inner, options.layers)
        self.ghost = linear_start(self.decoder, options.layers, self.sample(), options.rank, self.world)

    def modules(self) -> dict[str, dict[int, nn.Module]]:
        return {"ghost": {self.options.layers[0]: self.ghost}}

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.ghost.parameters()), "peak": self.options.lr}]

    def running(self) -> contextlib.AbstractContextManager[SkipRun]:
        return skipping(
            self.loaded.model, self.gate, self.ghost, decoder=self.decoder, keep_passes=True,
            prefill=self.gate.guards.prefill,
        )  # fmt: skip

    def compute(self, run: SkipRun, done: float) -> Tensor:
        ids = self.draw()
        with self.autocast():
            if done < 1 - self.options.end_to_end:
                run.force = torch.ones_like(ids, dtype=torch.bool)
                batch = capture(self.decoder, self.options.layers, ids)
                loss, away = self.ghost.losses(batch).sum(), torch.ones((), device=ids.device)
            else:
                loss, away = self._end_to_end(run, ids)
        if loss.requires_grad:  # else nobody was away
            loss.backward()
        run.passes.clear()
        return torch.stack([loss.detach().float(), away])

    def _end_to_end(self, run: SkipRun, ids: Tensor) -> tuple[Tensor, Tensor]:
        run.force = torch.ones_like(ids, dtype=torch.bool)
        with torch.no_grad():
            dense = self.decoder.last_hidden(ids)
        run.force = None
        if self.chance is not None:
            whole = torch.rand(self.world.size * ids.shape[0], ids.shape[1], device=ids.device)
            run.force = self.own(whole) >= self.chance
        gated = self.decoder.last_hidden(ids)
        away = (run.passes[-1].skipped > 0).float().mean()
        return kl_loss(dense.flatten(0, 1), gated.flatten(0, 1), self.decoder), away

    def shown(self, figures: dict[str, float]) -> str:
        return f"loss {figures['loss']:.4f}, {figures['away']:.1%} away"
