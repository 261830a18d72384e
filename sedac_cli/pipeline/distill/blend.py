"""The model as it is while gates are trained: every gated MLP runs, its stand-in runs, and a hard choice blends them.

The choice is straight-through: forward takes 0 or 1, backward sees a sigmoid, so a router learns from how much the loss
would change if it chose otherwise. A *skip score* m decides: skip where m > limit. For per-layer gates m is the layer's
router; for the latch form it is the largest score of all checkpoints so far, so a token that left stays away.

    with blended(decoder, parts) as control:
        control.limit = limits                 # [B, 1]: each sequence may have its own budget
        hidden = decoder.last_hidden(ids)
        scores = control.scores()              # [layers, B, T]
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sedac_cli.errors import InputError
from sedac_cli.structure import Decoder

NEVER = -1e4


@dataclass
class Control:
    """What the blended layers share. `on=False` gives the dense model."""

    on: bool = True
    noise: Tensor = field(default_factory=lambda: torch.zeros(()))
    limit: Tensor = field(default_factory=lambda: torch.zeros(0))
    sinks: int = 4
    part: tuple[int, int] = (0, 1)
    """Which part of how many equal ones this process has of the batch: noise is drawn for all of it."""
    running: Any = None
    layers: dict[int, Blend] = field(default_factory=dict)

    def start(self, limit: Tensor) -> None:
        """Begin a pass with these limits [B, 1]."""
        self.limit, self.running = limit, None

    def scores(self) -> Tensor:
        """[gated layers, B, T] of the last pass, detached."""
        return torch.stack([blend.score for blend in self.layers.values()])  # type: ignore[misc]

    def hold_budget(self) -> None:
        """After backward: let the limits follow the scores, so that no router gains by lowering all of them alike.

        A limit is a quantile of a sequence's scores; d limit / d score_i = s_i / sum(s), s the sigmoid's slope. Without
        this term every score sinks (less skipping always helps), the sigmoids saturate and the routers learn nothing:
        measured, KL 0.36 instead of 0.09 nats at a quarter skipped.
        """
        limit = self.limit
        assert limit.grad is not None
        scores = self.scores()
        keep = torch.sigmoid(limit.detach() - scores)
        slope = torch.where(scores > NEVER / 2, keep * (1 - keep), 0.0)
        share = slope / slope.sum(dim=(0, 2), keepdim=True).clamp_min(1e-6)
        torch.autograd.backward([self.scores_again()], [limit.grad.unsqueeze(0) * share])

    def scores_again(self) -> Tensor:
        """The last pass's scores from the inputs the routers saw, with a graph of the routers alone."""
        rows: list[Tensor] = []
        running: Any = None
        for blend in self.layers.values():
            if blend.router is not None:
                score = blend.mask(blend.router(blend.seen) + blend.jitter)
                running = score if not blend.latch or running is None else torch.maximum(score, running)
            rows.append(running)
        return torch.stack(rows)


class Blend(nn.Module):
    """Stands where the MLP stood. `router` is None at layers that follow an earlier checkpoint's decision."""

    def __init__(self, mlp: nn.Module, standin: nn.Module, router: nn.Module | None, control: Control, latch: bool):
        super().__init__()
        self.mlp = mlp
        self.standin = standin
        self.router = router
        self.control = control
        self.latch = latch
        self.score: Tensor | None = None
        self.entering: Tensor | None = None
        self.seen: Any = None
        self.jitter: Any = None

    def look(self, x: Tensor) -> Any:
        """What the router reads. Detached: it learns from its choice, the layers before it do not learn to please it."""
        return (x if self.entering is None else self.entering).detach()

    def shaken(self, score: Tensor) -> Tensor:
        """Score plus logistic noise. A straight-through gradient shows a skipped token all the harm of its own choice and
        a kept one none of it, so without noise every score is drawn to the limit; tossed both ways, each sees both."""
        part, parts = self.control.part
        whole = torch.rand((parts * score.shape[0], *score.shape[1:]), dtype=score.dtype, device=score.device)
        uniform = whole[part * score.shape[0] : (part + 1) * score.shape[0]].clamp(1e-6, 1 - 1e-6)
        self.jitter = self.control.noise * (uniform.log() - torch.log1p(-uniform))
        return self.mask(score + self.jitter)

    def mask(self, score: Tensor) -> Tensor:
        position = torch.arange(score.shape[1], device=score.device)
        return torch.where(position < self.control.sinks, NEVER, score)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(x)
        control = self.control
        if not control.on:
            return y
        if self.router is not None:
            self.seen = self.look(x)
            with torch.autocast(x.device.type, enabled=False):
                score = self.shaken(self.router(self.seen))
            if self.latch and control.running is not None:
                score = torch.maximum(score, control.running)
        else:
            score = control.running
        if self.latch:
            control.running = score
        self.score = score.detach()
        soft = torch.sigmoid(control.limit - score)
        hard = (score <= control.limit).to(soft.dtype)
        keep = (hard + soft - soft.detach()).unsqueeze(-1)
        return (keep * y + (1 - keep) * self.standin(x)).to(y.dtype)


@contextlib.contextmanager
def blended(
    decoder: Decoder,
    standins: dict[int, nn.Module],
    routers: dict[int, nn.Module],
    *,
    latch: bool,
    sinks: int,
    compile_layers: bool = False,
    part: tuple[int, int] = (0, 1),
    kind: type[Blend] = Blend,
) -> Iterator[Control]:
    """Put a Blend in the place of every gated MLP; on leaving, the model is as it was."""
    control = Control(sinks=sinks, part=part)
    undo: list[Any] = []
    try:
        for layer, standin in sorted(standins.items()):
            branch = decoder.branches[layer]
            if branch.entry is not branch.exit:
                raise InputError(f"layer {layer} has no single MLP module ({branch.name}): it cannot be distilled")
            owner, name = _owner(decoder.model, branch.name)
            blend = kind(branch.entry, standin, routers.get(layer), control, latch)
            setattr(owner, name, blend)
            undo.append((owner, name, branch.entry))
            control.layers[layer] = blend
            if latch and layer in routers:
                undo.append(decoder.at_checkpoint(layer, partial(setattr, blend, "entering")))
        if compile_layers:
            for module in decoder.layers:
                module.compile(dynamic=False)
        yield control
    finally:
        for item in reversed(undo):
            if isinstance(item, tuple):
                setattr(*item)
            else:
                item.remove()
        if compile_layers:
            for module in decoder.layers:
                module._compiled_call_impl = None


def _owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name
