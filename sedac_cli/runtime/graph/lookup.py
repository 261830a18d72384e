"""What a decode step begins with: the rows of its tokens in the embedding, and of their positions in tables of the rotary module.

A module is replaced by its table only where that surely gives the same bits: a plain embedding; a rotary module whose kind of
positions does not change with how far a sequence has come, and whose table was compared with itself at single positions. Any
other is called in every step.

    lookup = Lookup(embedding, standard.rotary, cache.places)
    h, (cos, sin), real = lookup(state, ops)            # [rows, H], [rows, rotary] each, [rows] bool
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sedac_cli.gpu.compile import KINDS
from sedac_cli.gpu.step import Turns
from sedac_cli.runtime.graph.ops import Ops
from sedac_cli.runtime.graph.rotation import FIXED
from sedac_cli.runtime.graph.state import State

CHUNK = 4096
"""Places at a time while tables are made: float32 on the way to them is then small beside a cache."""


class Lookup:
    def __init__(self, embedding: Any, rotary: nn.Module, places: int):
        """`places`: of the cache, which no position reaches."""
        self.embedding, self.rotary = embedding, rotary
        self.weight: Tensor | None = embedding.weight if plain(embedding) else None
        self.tables = rotary_tables(rotary, embedding, places)

    def __call__(self, state: State, ops: Ops) -> tuple[Tensor, Turns, Tensor]:
        h, turns, real = ops.step_begin(state, self.weight, self.tables)
        h = self.embedding(state.tokens) if h is None else h
        return h, turns or turned(self.rotary, h, state.position), real


def turned(rotary: nn.Module, h: Tensor, position: Tensor) -> Turns:
    """The module's own cosines and sines for rows [n, H] at positions [n]."""
    cos, sin = (table.reshape(h.shape[0], -1).to(h.dtype) for table in rotary(h.unsqueeze(1), position.unsqueeze(1)))
    return cos, sin


def plain(embedding: Any) -> bool:
    """Whether it gives rows of its weight as they are. (A padding index matters to gradients alone.)"""
    weight = embedding.weight
    return (
        type(embedding) is nn.Embedding and untouched(embedding) and embedding.max_norm is None
        and type(weight) is nn.Parameter and weight.dtype in KINDS and weight.stride(1) == 1
    )  # fmt: skip


def untouched(module: nn.Module) -> bool:
    """No hook, and no forward that was put in the place of the class's (accelerate's does that)."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


@torch.inference_mode()
def rotary_tables(rotary: Any, embedding: Any, places: int) -> Turns | None:
    """[places, rotary] each, as steps of that many rows would make them; None where they may not stand for the module."""
    kind = getattr(rotary, "rope_type", None)  # where layers differ, a dict of kinds
    if not isinstance(kind, str) or kind not in FIXED or not untouched(rotary):
        return None
    device = embedding.weight.device
    h = embedding(torch.zeros(1, dtype=torch.long, device=device))
    parts = [turned(rotary, h.expand(len(p), -1), p) for p in torch.arange(places, device=device).split(CHUNK)]
    cos, sin = (torch.cat(part) for part in zip(*parts, strict=True))
    for place in {0, 1, places // 2, places - 1}:
        alone = turned(rotary, h, torch.full((1,), place, device=device))
        if not all(torch.equal(table[place], one[0]) for table, one in zip((cos, sin), alone, strict=True)):
            return None
    return cos, sin
