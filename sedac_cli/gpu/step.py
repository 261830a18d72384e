"""What begins a decode step and what ends it, one launch each: as torch operations they are some 25.

The first looks up rows, of the embedding and of tables of rotary positions; the other puts the chosen tokens into the state and
into the record. Tokens, positions and flags are read on the device, so one captured step serves them all. A token or a position
without a row of its own gets the nearest: nothing is read out of bounds.

    h, turns, real = step_begin(state, weight, (cos, sin))
    step_end(choice, state, ends, pad, program.needs, burst.at(index))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sedac_cli.gpu.compile import I32, I64, kind, launch
from sedac_cli.gpu.tensors import MASK, flat

if TYPE_CHECKING:
    from sedac_cli.runtime.graph.state import Burst, Choice, State

Turns = tuple[Tensor, Tensor]
"""Cosines and sines: [rows, rotary] each; as tables, [places, rotary]."""
THREADS = 256


def step_begin(
    state: State, weight: Tensor | None = None, tables: Turns | None = None
) -> tuple[Tensor | None, Turns | None, Tensor]:
    """(`weight` [vocabulary, H] at the tokens, both tables at the positions, True for the rows that have not finished)."""
    rows, device = state.tokens.shape[0], state.tokens.device
    sources = [t for t in (weight, *(tables or ())) if t is not None]
    for t in sources:
        if t.dim() != 2 or t.stride(1) != 1 or t.dtype != sources[0].dtype or t.device != device:
            raise ValueError(
                f"a table of {tuple(t.shape)} {t.dtype} on {t.device}: dense rows of one dtype, on {device}"
            )
    real = torch.empty(rows, dtype=torch.bool, device=device)
    found = [t.new_empty(rows, t.shape[1]) for t in sources]
    h = found[0] if weight is not None else None
    turns = (found[-2], found[-1]) if tables is not None else None
    if rows:
        launch(
            "step", "step_begin", {"T": kind(sources[0], "a table") if sources else 0}, device, early=True,
            grid=(rows, 3 if tables else 1), threads=THREADS,
            args=[
                flat(state.tokens, "tokens", rows, device, torch.int64),
                flat(state.position, "position", rows, device, torch.int64),
                flat(state.finished, "finished", rows, device, *MASK),
                *_weight_args(weight), h, *_table_args(tables), *(turns or (None, None)), real,
            ],
        )  # fmt: skip
    return h, turns, real


def _weight_args(weight: Tensor | None) -> list[Tensor | np.generic | None]:
    if weight is None:
        return [None, I64(0), I64(0), I32(0)]
    return [weight, I64(weight.stride(0)), I64(weight.shape[0]), I32(weight.shape[1])]


def _table_args(tables: Turns | None) -> list[Tensor | np.generic | None]:
    if tables is None:
        return [None, None, I64(0), I32(0)]
    places, rotary = tables[0].shape
    cos, sin = (flat(t, "a rotary table", places * rotary, t.device, t.dtype) for t in tables)
    return [cos, sin, I64(places), I32(rotary)]


def step_end(choice: Choice, state: State, ends: Tensor, pad: int, needs: Tensor, record: Burst) -> None:
    """Into `state`: the tokens (`pad` where a row had finished), which rows have finished with them, the next position and slot.
    Into `record`, one step of a burst: the tokens, what is known of their choice, the flags `needs`, which rows have finished."""
    device, rows, layers = state.tokens.device, state.tokens.shape[0], needs.shape[0]

    def row(tensor: Tensor | None, name: str, dtype: torch.dtype) -> Tensor | None:
        return flat(tensor, name, rows, device, dtype)

    long, real = torch.int64, torch.float32
    launch(
        "step", "step_end", {}, device, early=True, grid=(2,), threads=THREADS,
        args=[
            row(choice.token, "token", long), row(choice.entropy, "entropy", real),
            row(choice.confidence, "confidence", real), row(choice.above, "above", real), I32(rows),
            flat(ends, "ends", ends.numel(), device, long), I32(ends.numel()), I64(pad),
            row(state.tokens, "tokens", long), row(state.position, "position", long),
            row(state.finished, "finished", torch.bool), flat(state.slot, "slot", 1, device, long),
            flat(needs, "needs", layers, device, torch.int32), I32(layers), row(record.tokens, "record.tokens", long),
            row(record.entropy, "record.entropy", real), row(record.logprob, "record.logprob", real),
            row(record.finished, "record.finished", torch.bool),
            flat(record.needs, "record.needs", layers, device, torch.int32),
        ],
    )  # fmt: skip
