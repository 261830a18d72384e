"""Recipes of `sedac distill` under trial: each is the product's own trainer with one thing changed.

    trainer = make("hidden:0.1", loaded, windows, options, stop); trainer.run()

Whatever a recipe adds starts at zero and draws nothing at random: its first loss is that of today's recipe, bit for bit.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sedac_cli.costs import branch_flops
from sedac_cli.errors import UsageError
from sedac_cli.gates.learned import Router
from sedac_cli.models import LoadedModel
from sedac_cli.pipeline import Progress, quiet_progress
from sedac_cli.pipeline.distill.blend import Blend, Control
from sedac_cli.pipeline.distill.train import DistillOptions, Trainer


@dataclass
class Stop:
    """When to end early: once asked to, or when the time is up."""

    deadline: float = float("inf")
    asked: bool = False

    def __call__(self) -> bool:
        return self.asked or time.monotonic() >= self.deadline


class Recipe(Trainer):
    """Today's recipe. `amount` is the number after the colon of its name."""

    default = 0.0

    def __init__(
        self, loaded: LoadedModel, windows: Tensor, options: DistillOptions, amount: float, stop: Stop,
        progress: Progress = quiet_progress,
    ):  # fmt: skip
        self.stop, self.amount = stop, amount
        super().__init__(loaded, windows, self.changed(options), progress=progress)

    def changed(self, options: DistillOptions) -> DistillOptions:
        return options

    def _done(self) -> float:
        return 1.0 if self.stop() else super()._done()

    def costs(self) -> dict[str, float]:
        """Shares of an MLP: a stand-in, on average; what all tokens pay for deciding, per layer of the model."""
        config = self.loaded.model.config.get_text_config()
        mlp = [branch_flops(branch.entry, config) for branch in self.decoder.branches]
        standins: Any = [self.standins[x].flops() / mlp[x] for x in self.layers]  # type: ignore[operator]
        routers: Any = sum(router.flops() for router in self.routers.values())  # type: ignore[operator]
        return {"standin": sum(standins) / len(standins), "deciding": routers / sum(mlp)}

    def learned(self) -> dict[str, Any]:
        """What the added parameters have become."""
        return {}


class Seed(Recipe):
    """Today's recipe with another seed: what differs is noise."""

    default = 1.0

    def changed(self, options: DistillOptions) -> DistillOptions:
        return replace(options, seed=options.seed + int(self.amount))


class Hidden(Recipe):
    """KL + amount x how far the last hidden state, after the final norm, is from the dense one."""

    default = 0.1
    figures = ("kl", "skipped", "apart")

    def objective(self, kl: Tensor, dense: Tensor, gated: Tensor) -> Tensor:
        found = self.apart(dense, gated)
        self.found = found.detach()
        return kl + self.amount * found

    def apart(self, dense: Tensor, gated: Tensor) -> Tensor:
        return squared(dense, gated)

    def compute(self, form: Any, done: float) -> Tensor:
        figures = super().compute(form, done)
        return torch.cat([figures, self.found.view(1)])


def squared(dense: Tensor, gated: Tensor) -> Tensor:
    """Mean squared difference over the variance of the dense entries."""
    dense = dense.float()
    return (gated.float() - dense).pow(2).mean() / dense.var()


@dataclass
class Spot:
    """The state entering one layer, as the last dense and the last gated pass had it."""

    control: Control
    dense: Any = None
    gated: Any = None

    def see(self, hidden: Tensor) -> None:
        if self.control.on:
            self.gated = hidden
        else:
            self.dense = hidden


class Layers(Hidden):
    """The same on average over the states after every seventh layer, the last one after the final norm."""

    every = 7

    @contextlib.contextmanager
    def form(self, compile_layers: bool = False) -> Iterator[Control]:
        with super().form(compile_layers) as control, contextlib.ExitStack() as hooks:
            self.spots = []
            for layer in range(self.every, self.decoder.num_layers, self.every):
                self.spots.append(Spot(control))
                hooks.callback(self.decoder.at_checkpoint(layer, self.spots[-1].see).remove)
            yield control

    def apart(self, dense: Tensor, gated: Tensor) -> Tensor:
        found = [squared(spot.dense, spot.gated) for spot in self.spots]
        return torch.stack([*found, squared(dense, gated)]).mean()


class SeeingRouter(nn.Module):
    """score += a log1p(position)/8 + b (share of the earlier gated MLPs skipped) + c (the MLP just before skipped)."""

    def __init__(self, router: Router):
        super().__init__()
        self.router = router
        self.sees = nn.Parameter(torch.zeros(3))

    def forward(self, seen: tuple[Tensor, Tensor]) -> Tensor:
        x, facts = seen
        return self.router(x) + (facts * self.sees).sum(-1)

    def flops(self) -> float:
        """Three multiply-adds, the count of skips and the share of them."""
        return self.router.flops() + 8.0


class SeeingBlend(Blend):
    """`control.running` is what this pass decided so far: skips [B, T], how many layers decided, the last one's skips.

    The facts are hard and, like the rest of what a router reads, detached: only `keep` is straight-through.
    """

    follows: Tensor
    """1 where the layer just before can skip too, else 0; a tensor, so that one compiled graph serves both."""

    def look(self, x: Tensor) -> tuple[Tensor, Tensor]:
        seen = super().look(x)
        place = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)
        position = (torch.log1p(place) / 8).expand(x.shape[:2])
        share = before = torch.zeros_like(position)
        if self.control.running is not None:
            skips, count, last = self.control.running
            share, before = skips / count, last * self.follows
        return seen, torch.stack([position, share, before], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        control = self.control
        if control.on:
            assert self.score is not None
            skipped = (self.score > control.limit).float()
            if control.running is None:
                control.running = skipped, torch.ones((), device=x.device), skipped.clone()
            else:
                skips, count, _ = control.running
                control.running = skips + skipped, count + 1, skipped
        return y


class Sees(Recipe):
    """Routers that also read the token's position and its earlier skips. The amount is the peak rate of what reads them,
    the routers' own if 0."""

    blend = SeeingBlend

    def _router(self, layer: int) -> Any:
        return SeeingRouter(super()._router(layer))

    @contextlib.contextmanager
    def form(self, compile_layers: bool = False) -> Iterator[Control]:
        with super().form(compile_layers) as control:
            for layer, blend in control.layers.items():
                blend.follows = torch.tensor(float(layer - 1 in control.layers), device=self.device)
            yield control

    def groups(self) -> list[dict[str, Any]]:
        groups, own = super().groups(), [router.sees for router in self.routers.values()]
        mine = {id(p) for p in own}
        groups[0]["params"] = [p for p in groups[0]["params"] if id(p) not in mine]
        return [*groups, {"params": own, "peak": self.amount or self.options.router_lr}]

    def learned(self) -> dict[str, Any]:
        return {"position, share, before": {x: router.sees.tolist() for x, router in self.routers.items()}}


class Gained(nn.Module):
    """A norm whose weight is multiplied by 1 + d in the gated pass; d is kept and applied in float32."""

    def __init__(self, norm: nn.Module, d: nn.Parameter, control: Control):
        super().__init__()
        self.norm, self.d, self.control = norm, d, control

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return (y * (1 + self.d)).to(y.dtype) if self.control.on else y


class Gains(Recipe):
    """Every norm of the decoder layers has a learned gain while gates are on. The amount is the gains' peak rate.

    Where gates are on the gains can be multiplied into the weights: they cost nothing to run.
    """

    default = 1e-3

    def _prepare(self) -> None:
        super()._prepare()
        self.gains: dict[int, nn.Module] = {
            layer: nn.ParameterDict(
                {name: torch.zeros(self.decoder.hidden_size, device=self.device) for name in norms(module)}
            )
            for layer, module in enumerate(self.decoder.layers)
        }

    def modules(self) -> dict[str, dict[int, nn.Module]]:
        return super().modules() | {"gains": self.gains}

    def groups(self) -> list[dict[str, Any]]:
        own = [p for gains in self.gains.values() for p in gains.parameters()]
        return [*super().groups(), {"params": own, "peak": self.amount}]

    @contextlib.contextmanager
    def form(self, compile_layers: bool = False) -> Iterator[Control]:
        with super().form(compile_layers) as control, contextlib.ExitStack() as undo:
            for layer, module in enumerate(self.decoder.layers):
                for name, norm in norms(module).items():
                    undo.callback(partial(setattr, module, name, norm))
                    setattr(module, name, Gained(norm, self.gains[layer][name], control))  # type: ignore[index]
            yield control

    def learned(self) -> dict[str, Any]:
        return {
            "deviation of the gains": {
                layer: {name: float(d.detach().pow(2).mean().sqrt()) for name, d in gains.items()}  # type: ignore[operator]
                for layer, gains in self.gains.items()
            }
        }


def norms(layer: nn.Module) -> dict[str, nn.Module]:
    """The norms of a decoder layer that stand beside its attention and its MLP, by name."""
    found = {name: child for name, child in layer.named_children() if all(p.dim() == 1 for p in child.parameters())}
    return {name: child for name, child in found.items() if any(True for _ in child.parameters())}


RECIPES: dict[str, type[Recipe]] = {
    "base": Recipe, "seed": Seed, "hidden": Hidden, "layers": Layers, "sees": Sees, "gains": Gains,
}  # fmt: skip


def parse(spec: str) -> tuple[type[Recipe], float]:
    """`hidden:0.1` -> the recipe and its amount."""
    name, colon, number = spec.partition(":")
    if name not in RECIPES:
        raise UsageError(f"there is no recipe '{name}'", hint="known: " + ", ".join(RECIPES))
    try:
        return RECIPES[name], float(number) if colon else RECIPES[name].default
    except ValueError:
        raise UsageError(f"recipe '{spec}': '{number}' is not a number") from None


def make(
    spec: str, loaded: LoadedModel, windows: Tensor, options: DistillOptions, stop: Stop | None = None,
    progress: Progress = quiet_progress,
) -> Recipe:  # fmt: skip
    kind, amount = parse(spec)
    return kind(loaded, windows, options, amount, stop or Stop(), progress)
