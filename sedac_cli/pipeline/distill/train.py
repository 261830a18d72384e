"""Train routers and stand-ins by KL to the dense model, over a whole range of budgets at once.

Every sequence of a batch draws a share of MLPs to skip; its limit on the skip scores comes from running quantiles, so the
budget is met and the loss is KL alone. The backbone is frozen: with skipping off the model is bit-identical.

    trainer = Trainer(loaded, windows, DistillOptions(minutes=8)); trainer.run()
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sedac_cli.artifacts.tensors import load_tensors
from sedac_cli.errors import UsageError
from sedac_cli.gates.learned import Router
from sedac_cli.models import LoadedModel
from sedac_cli.pipeline import Progress, quiet_progress
from sedac_cli.pipeline.distill.blend import NEVER, Blend, Control, blended
from sedac_cli.pipeline.distill.budget import BudgetTable
from sedac_cli.pipeline.distill.loop import Loop, LoopOptions
from sedac_cli.pipeline.distill.loss import kl_loss
from sedac_cli.pipeline.distill.scan import gather, harm_scan, skippable, spread_ranks, start
from sedac_cli.pipeline.world import World
from sedac_cli.probes import LREProbe

TRAINED = ("learned", "cascade")
"""Gates that are trained together with their stand-ins."""


RANK_BY = ("uniform", "importance")


@dataclass(frozen=True)
class DistillOptions(LoopOptions):
    gate: str = "learned"
    target_skip: float = 0.25
    rank: int = 48
    rank_by: str = "uniform"
    layers: tuple[int, ...] | None = None
    checkpoints: tuple[int, ...] | None = None
    router_lr: float = 3e-4
    router_width: int = 16
    spread: float = 0.5
    noise: float = 1.0
    sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate not in TRAINED:
            raise UsageError(f"--gate: '{self.gate}' cannot be distilled", hint=" or ".join(TRAINED))
        if self.rank_by not in RANK_BY:
            raise UsageError(f"--rank-by: '{self.rank_by}' is not known", hint=" or ".join(RANK_BY))
        if not 0 < self.target_skip < 1:
            raise UsageError(f"--target-skip: {self.target_skip} is not between 0 and 1")


class LatchRouter(nn.Module):
    """An LREProbe seen as a router: skip score = -(what goes into the softplus), so low risk is a high score."""

    def __init__(self, probe: LREProbe):
        super().__init__()
        self.probe = probe

    def forward(self, hidden: Tensor) -> Tensor:
        probe = self.probe
        return -probe.head(probe.norm(probe.proj(hidden.float()))).squeeze(-1)


class Trainer(Loop):
    blend = Blend

    def __init__(
        self, loaded: LoadedModel, windows: Tensor, options: DistillOptions, state_file: Path | None = None,
        progress: Progress = quiet_progress, world: World | None = None,
    ):  # fmt: skip
        super().__init__(loaded, windows, options, state_file, progress, world)
        self.options = options
        self._prepare()

    # Before ---------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Closed-form starts, the harm scan, and the layers that take part."""
        options, decoder = self.options, self.decoder
        sample = self.sample()
        moments = gather(decoder, sample, self.world)
        standins = {layer: start(m, options.rank).to(self.device) for layer, m in moments.items()}
        self.harm = harm_scan(decoder, standins, sample[:2], self.world)
        latch = options.gate == "cascade"
        if latch:
            last = decoder.num_layers - 1
            points = options.checkpoints or tuple(range(decoder.num_layers // 4, last, 2))
            layers = tuple(range(points[0], last + 1 if self.harm[last] <= 6 * self._median_harm() else last))
            self.routers: dict[int, nn.Module] = {
                layer: LatchRouter(self._probe(moments[layer].tokens)) for layer in points
            }
        else:
            layers = options.layers or tuple(skippable(self.harm))
            self.routers = {layer: self._router(layer) for layer in layers}
        self.layers = layers
        for router in self.routers.values():
            router.to(self.device)
        if options.rank_by == "importance":
            ranks = self._agreed(self._begun_with() or spread_ranks(moments, self.harm, layers, options.rank))
            standins = {layer: start(moments[layer], ranks[layer]).to(self.device) for layer in layers}
        self.standins: dict[int, nn.Module] = {layer: standins[layer] for layer in layers}
        self.ranks = {layer: standins[layer].rank for layer in layers}
        self.table = BudgetTable(len(layers), decoder.num_layers, self.device)
        if options.target_skip > 0.98 * self.table.ceiling:
            raise UsageError(
                f"--target-skip {options.target_skip}: at most {self.table.ceiling:.2f} of all MLPs can be skipped, "
                f"{len(layers)} of {decoder.num_layers} layers may skip"
            )

    def _begun_with(self) -> dict[int, int] | None:
        """The ranks of an interrupted run: measured again they might differ by a rounding."""
        if self.state_file is None or not self.state_file.exists():
            return None
        return load_tensors(self.state_file)["extra"]["ranks"]

    def _agreed(self, ranks: dict[int, int]) -> dict[int, int]:
        """The first process's."""
        values = torch.tensor(list(ranks.values()), device=self.device)
        self.world.share_first([values])
        return dict(zip(ranks, values.tolist(), strict=True))

    def _median_harm(self) -> float:
        return sorted(self.harm.values())[len(self.harm) // 2]

    def _router(self, layer: int) -> Router:
        """Random directions, and an offset that starts with the layers that do least harm."""
        size = self.decoder.hidden_size
        router = Router(size, self.options.router_width)
        nn.init.normal_(router.weight, std=0.3 / size**0.5)
        nn.init.normal_(router.inner, std=size**-0.5)
        nn.init.normal_(router.outer, std=0.02)
        nn.init.constant_(router.bias, -math.log(max(self.harm[layer], 1e-6) / self._median_harm()))
        return router

    def _probe(self, tokens: int) -> LREProbe:
        return LREProbe(self.decoder.hidden_size, 64)

    # The loop -------------------------------------------------------------------------------------------------

    def modules(self) -> dict[str, dict[int, nn.Module]]:
        return {"routers": self.routers, "standins": self.standins}

    def groups(self) -> list[dict[str, Any]]:
        routers = [p for router in self.routers.values() for p in router.parameters()]
        standins = [p for standin in self.standins.values() for p in standin.parameters()]
        return [
            {"params": routers, "peak": self.options.router_lr},
            {"params": standins, "peak": self.options.lr},
        ]

    def running(self) -> contextlib.AbstractContextManager[Control]:
        return self.form(self.options.compile)

    def form(self, compile_layers: bool = False) -> contextlib.AbstractContextManager[Control]:
        """The model in its training form: for the steps, and for the curve after them."""
        return blended(
            self.decoder, self.standins, self.routers, latch=self.options.gate == "cascade", sinks=self.options.sinks,
            compile_layers=compile_layers, part=(self.world.rank, self.world.size), kind=self.blend,
        )  # fmt: skip

    def objective(self, kl: Tensor, dense: Tensor, gated: Tensor) -> Tensor:
        """What is minimised, from the batch's KL and the last hidden states [B, T, H] of both passes."""
        return kl

    def compute(self, control: Control, done: float) -> Tensor:
        ids = self.draw()
        with torch.no_grad(), self.autocast():
            control.on = False
            dense = self.decoder.last_hidden(ids)
            control.on = True
            if not self.table.seen:
                control.start(torch.full((ids.shape[0], 1), -NEVER, device=self.device))
                self.decoder.last_hidden(ids)
                self.table.update(control.scores(), self.world)
        shares = self._shares(done)
        control.noise = torch.tensor(self.options.noise * max(0.1, 1 - done / 0.8), device=self.device)
        control.start(self.table.limits(shares).requires_grad_())
        with self.autocast():
            gated = self.decoder.last_hidden(ids)
            loss = kl_loss(dense.flatten(0, 1), gated.flatten(0, 1), self.decoder)
        self.objective(loss, dense, gated).backward()
        control.hold_budget()
        scores = control.scores()
        skipped = (scores > control.limit).float().mean() * self.table.ceiling
        self.table.update(scores, self.world)
        self.table.correct(self.world.mean(shares.mean()), self.world.mean(skipped))
        return torch.stack([loss.detach().float(), skipped])

    def _shares(self, done: float) -> Tensor:
        """Half of the sequences train the target share, the others a spread of shares; all are eased in."""
        target, count = self.options.target_skip, self.options.batch_size * self.world.size
        ease = min(1.0, done / 0.15)
        wide = torch.rand(count, device=self.device) * min(0.95 * self.table.ceiling, 2.4 * target)
        chosen = torch.where(torch.rand(count, device=self.device) < self.options.spread, wide, target)
        return self.own(chosen * ease)

    def extra(self) -> dict[str, Any]:
        table = self.table
        return {
            "table": table.table, "seen": table.seen, "usable": table.usable, "gain": table.gain, "ranks": self.ranks,
        }  # fmt: skip

    def load_extra(self, state: dict[str, Any]) -> None:
        table = self.table
        table.table, table.seen = state["table"].to(self.device), state["seen"]
        table.usable, table.gain = state["usable"].to(self.device), state["gain"].to(self.device)
