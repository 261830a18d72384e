"""Train stand-ins for a gate that stays as it is: `fixed`, `cascade`, `soft`, `stability`, and any other that needs none.

The model runs as it will: the runtime that really skips, under the gate's own choices, with the stand-ins' gradients kept.
A soft gate blends as it will blend. Text stands for the phase the gate acts in. So nothing is written twice, and what is trained is what is used.

    trainer = GivenTrainer(loaded, windows, GivenOptions(gate="stability:tau=0.95", steps=500)); trainer.run()
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sedac_cli.errors import UsageError
from sedac_cli.gates.base import Gate
from sedac_cli.models import LoadedModel
from sedac_cli.pipeline import Progress, quiet_progress
from sedac_cli.pipeline.distill.curve import compare_sums
from sedac_cli.pipeline.distill.loop import Loop, LoopOptions
from sedac_cli.pipeline.distill.loss import kl_loss
from sedac_cli.pipeline.distill.scan import gather, start
from sedac_cli.pipeline.world import World
from sedac_cli.runtime.skip import SkipRun, skipping
from sedac_cli.standins import StandIn, ZeroStandIn
from sedac_cli.standins.lowrank import LowRank, LowRankStandIns


@dataclass(frozen=True)
class GivenOptions(LoopOptions):
    gate: str = ""
    rank: int = 48


class InTraining:
    """Stand-ins whose weights stay where the optimizer has them; they compute in the precision of what they are given."""

    def __init__(self, by_layer: dict[int, nn.Module]):
        self.by_layer = by_layer

    def rows(self, layer: int, x: Tensor) -> Tensor | None:
        return self.by_layer[layer](x) if layer in self.by_layer else None

    def cost_per_token(self, layer: int) -> float:
        return self.by_layer[layer].flops() if layer in self.by_layer else 0.0  # type: ignore[operator]


class GivenTrainer(Loop):
    def __init__(
        self, loaded: LoadedModel, windows: Tensor, options: GivenOptions, gate: Gate, state_file: Path | None = None,
        progress: Progress = quiet_progress, world: World | None = None,
    ):  # fmt: skip
        super().__init__(loaded, windows, options, state_file, progress, world)
        self.options, self.gate = options, gate
        if getattr(gate, "adaptive", None) is not None:
            raise UsageError(
                f"gate '{options.gate}' moves its thresholds: its choices are not there to be trained under",
                hint="thresholds that stay: `sedac calibrate`",
            )
        sample = self.sample()
        self.skip_rates = self._skip_rates(sample[:2])
        layers = [layer for layer, rate in enumerate(self.skip_rates) if rate > 0]
        if not layers:
            raise UsageError(
                f"gate '{options.gate}' skips nothing on this text: there is nothing to stand in for",
                hint="looser thresholds: `sedac calibrate`",
            )
        moments = gather(self.decoder, sample, self.world)
        self.standins: dict[int, nn.Module] = {x: start(moments[x], options.rank).to(self.device) for x in layers}

    @torch.no_grad()
    def _skip_rates(self, sample: list[Tensor]) -> list[float]:
        """Share of tokens that take a stand-in, alone or blended, by layer: what each layer needs one for."""
        seen = torch.zeros(self.decoder.num_layers, device=self.device)
        watch = _Watch(seen)
        with skipping(self.loaded.model, self.gate, watch, decoder=self.decoder, prefill=self.gate.guards.prefill):
            for ids in sample:
                self.decoder.last_hidden(ids)
        return (self.world.mean(seen) / max(1, sum(ids.numel() for ids in sample))).tolist()

    def modules(self) -> dict[str, dict[int, nn.Module]]:
        return {"standins": self.standins}

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": [p for m in self.standins.values() for p in m.parameters()], "peak": self.options.lr}]

    def running(self) -> contextlib.AbstractContextManager[SkipRun]:
        standin = InTraining(self.standins)
        return skipping(
            self.loaded.model, self.gate, standin, decoder=self.decoder, keep_passes=True,
            prefill=self.gate.guards.prefill,
        )  # fmt: skip

    def compute(self, run: SkipRun, done: float) -> Tensor:
        ids = self.draw()
        with self.autocast():
            run.force = torch.ones_like(ids, dtype=torch.bool)
            with torch.no_grad():
                dense = self.decoder.last_hidden(ids)
            run.force = None
            gated = self.decoder.last_hidden(ids)
            loss = kl_loss(dense.flatten(0, 1), gated.flatten(0, 1), self.decoder)
        if loss.requires_grad:  # else nothing was skipped
            loss.backward()
        skipped = run.passes[-1].skipped.float().mean() / self.decoder.num_layers
        run.passes.clear()
        return torch.stack([loss.detach().float(), skipped])


class _Watch(ZeroStandIn):
    """Counts who asks."""

    def __init__(self, seen: Tensor):
        self.seen = seen

    def rows(self, layer: int, x: Tensor) -> Tensor | None:
        self.seen[layer] += x.shape[0]
        return None


@torch.no_grad()
def measure_given(
    loaded: LoadedModel, held: Tensor, gate: Gate, standins: dict[str, StandIn], batch: int = 8
) -> dict[str, dict[str, float]]:
    """For each kind of stand-in, under the gate's choices: share skipped, ppl ratio, agreement, KL (nats)."""
    decoder = loaded.decoder
    rows = {}
    for name, standin in standins.items():
        sums = torch.zeros(4, dtype=torch.float64)
        with skipping(
            loaded.model, gate, standin, decoder=decoder, keep_passes=True, prefill=gate.guards.prefill
        ) as run:
            for ids in held.long().to(decoder.device).split(batch):
                run.force = torch.ones_like(ids, dtype=torch.bool)
                dense = decoder.last_hidden(ids)
                run.force = None
                sums += compare_sums(dense, decoder.last_hidden(ids), ids, loaded).cpu()
        skipped = sum(int(p.skipped.sum()) for p in run.passes)
        nll_dense, nll_gated, agree, kl = (sums / (held.shape[0] * (held.shape[1] - 1))).tolist()
        rows[name] = {
            "share": skipped / held.numel() / decoder.num_layers, "ppl_ratio": math.exp(nll_gated - nll_dense),
            "agreement": agree, "kl": kl,
        }  # fmt: skip
    return rows


def as_standins(modules: dict[int, nn.Module]) -> LowRankStandIns:
    """What training ended with, for the runtimes."""
    return LowRankStandIns({layer: m for layer, m in modules.items() if isinstance(m, LowRank)})
