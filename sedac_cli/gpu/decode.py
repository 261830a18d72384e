"""What a decode step does between its matrices, one launch each: RMSNorm; rotary positions, cache write and attention.

Attention in float16 and bfloat16; head sizes divisible by 16 up to 256; up to 16 query heads per key head. Positions and lengths
are read on the device, so one captured step serves every position.

    x = rms_norm(h, weight, 1e-6)
    a = attend(qkv, heads, cos, sin, keys, values, slot, first, scratch)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sedac_cli.gpu.compile import F32, I32, I64, PORTABLE_CLUSTER, counters, device_index, kind, launch, properties
from sedac_cli.gpu.probe import MAX_UNITS, Handles, RouterWeights
from sedac_cli.gpu.tensors import MASK, Number, flat, number

MAX_HEAD, MAX_GROUP = 256, 16
MAX_CLUSTER, MOST_TILES = 16, 4
KEYS, WARPS, MORE_WARPS, STAGES = 16, 4, 8, 2
"""Of attention: keys of a tile, warps of a block, those of one of so many blocks that each has a multiprocessor to itself (steps of
16 and 32 sequences took 0.5 and 1 % less, at 900 keys 3.7 %; 64, which have two blocks a multiprocessor, 2.4 % more), tiles in a
warp's ring where they fit."""
RESERVED = 16 * 1024
"""Bytes of shared memory that attention declares beside the rings, at most."""


@dataclass(frozen=True)
class Heads:
    """The shape of one attention layer. `rotary`: the leading part of a head that positions rotate."""

    query: int
    key: int
    size: int
    rotary: int
    scale: float
    window: int = 0
    softcap: float = 0.0

    @property
    def group(self) -> int:
        return self.query // self.key

    @property
    def width(self) -> int:
        """Columns of q, k and v side by side."""
        return (self.query + 2 * self.key) * self.size

    def why_not(self) -> str | None:
        """What the kernels cannot do with it, or None."""
        if self.size % 16 or self.size > MAX_HEAD:
            return f"heads of {self.size}: the attention kernel takes multiples of 16 up to {MAX_HEAD}"
        if self.query % self.key or self.group > MAX_GROUP:
            return f"{self.query} query heads on {self.key} key heads: at most {MAX_GROUP} may share one"
        if self.rotary % 2 or self.rotary > self.size:
            return f"{self.rotary} rotated elements of heads of {self.size}"
        return None


def rms_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool = False, out: Tensor | None = None) -> Tensor:
    """[M, H] -> [M, H]. `plus_one`: the weight is stored less one, and applied before rounding (Gemma)."""
    out = torch.empty_like(x) if out is None else out
    _rms_norm(x, weight, eps, plus_one, out)
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, plus_one: bool = False
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), each [M, H] and new; the sum is rounded before it is normed."""
    out, total = torch.empty_like(x), torch.empty_like(x)
    _rms_norm(x, weight, eps, plus_one, out, residual, total)
    return out, total


def _rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    plus_one: bool,
    out: Tensor,
    residual: Tensor | None = None,
    total: Tensor | None = None,
) -> None:
    constants = {"T": kind(x, "x")} | _residual(residual)
    if x.shape[0]:
        launch(
            "norm", "rms_norm", constants, x.device, early=True, grid=(x.shape[0],), threads=256,
            args=[
                x, I64(x.stride(0)), I32(x.shape[1]), flat(weight, "weight", x.shape[1], x.device, x.dtype), F32(eps),
                I32(int(plus_one)), out, I64(out.stride(0)), *_sum_args(x, residual, total),
            ],
        )  # fmt: skip


def _residual(residual: Tensor | None) -> dict[str, int]:
    return {} if residual is None else {"RESIDUAL": 1}


def _sum_args(x: Tensor, residual: Tensor | None, total: Tensor | None) -> list[Tensor | np.generic | None]:
    """What is added to x and where the sum goes, with the strides of their rows. In place it would be read by other blocks."""
    if residual is None or total is None:
        if residual is not total:
            raise ValueError("a residual and a place for the sum: both or neither")
        return [None, I64(0), None, I64(0)]
    for name, rows in (("residual", residual), ("sum", total)):
        if rows.shape != x.shape or rows.dtype != x.dtype or rows.device != x.device or rows.stride(1) != 1:
            raise ValueError(
                f"the {name} is {tuple(rows.shape)} {rows.dtype} on {rows.device}: expected {tuple(x.shape)} {x.dtype}"
            )
    if total.data_ptr() in (x.data_ptr(), residual.data_ptr()):
        raise ValueError("the sum needs memory of its own: every block reads the whole row")
    return [residual, I64(residual.stride(0)), total, I64(total.stride(0))]


def attend_constants(
    element: int, heads: Heads, rows: int, places: int, processors: int, shared: int, clusters: bool = False
) -> dict[str, int]:
    """`shared`: bytes a block may have. As many shares as there are multiprocessors: a cluster that finds no room at once doubles
    the time. With clusters, the blocks of a group are one where that leaves none of their warps more than MOST_TILES tiles of
    keys: they need no memory between them."""
    each = processors // (rows * heads.key)  # multiprocessors for a row and key head
    constants = {
        "T": element, "D": heads.size, "G": heads.group, "WARPS": MORE_WARPS if each in (1, 2) else WARPS, "STAGES": STAGES,
        "SPLITS": max(1, min(32, -(-places // KEYS), each)),
    }  # fmt: skip
    for fewer in ({"WARPS": WARPS}, {"STAGES": 1}):
        if attend_bytes(constants) > shared - RESERVED:
            constants |= fewer
    together = 1 << min(constants["SPLITS"], MAX_CLUSTER).bit_length() - 1
    fits = together == constants["SPLITS"] or places <= MOST_TILES * KEYS * constants["WARPS"] * together
    if clusters and together > 1 and fits:
        constants |= {"SPLITS": together, "CLUSTERED": 1}
    return constants


def attend_bytes(constants: dict[str, int]) -> int:
    """Shared memory: a ring of tiles of keys and values for each warp, later the warps' sums."""
    return constants["WARPS"] * constants["STAGES"] * 2 * KEYS * (2 * constants["D"] + 16)


def attend_scratch(rows: int, heads: Heads, device: torch.device) -> Tensor:
    """What blocks leave for the one that ends last; may be shared by all layers of a step."""
    return torch.empty(rows * heads.key * 32 * heads.group * (heads.size + 2), dtype=torch.float32, device=device)


def attend(
    qkv: Tensor,
    heads: Heads,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slot: Tensor,
    first: Tensor,
    scratch: Tensor,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """[M, query heads x size]: row m over places first[m]..slot of the cache (its last `window` of them, if there is one).

    k of [M, q + k + v], rotated, and v go to place `slot` of [M, key heads, places, size] first. `norms`: weights of an RMSNorm over
    each head of q and of k, before the rotation. cos, sin, slot and first are read before the launch just ahead has ended."""
    rows, places = qkv.shape[0], keys.shape[2]
    shape = (rows, heads.query * heads.size)
    out = torch.empty(shape, dtype=qkv.dtype, device=qkv.device) if out is None else out
    if qkv.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"qkv is {qkv.dtype}: the attention kernel takes float16 and bfloat16")
    machine = properties(device_index(qkv.device))
    constants = attend_constants(
        kind(qkv, "qkv"), heads, rows, places, machine.multi_processor_count, machine.shared_memory_per_block_optin,
        machine.major >= 9,
    )  # fmt: skip
    if scratch.numel() < rows * heads.key * constants["SPLITS"] * heads.group * (heads.size + 2):
        raise ValueError(f"scratch of {scratch.numel()} floats is too small for {rows} rows")
    for name, table in (("cos", cos), ("sin", sin)):
        flat(table, name, rows * heads.rotary, qkv.device, qkv.dtype)
    launch(
        "attend", "attend", constants, qkv.device, early=True, grid=(rows * heads.key, constants["SPLITS"]),
        threads=32 * constants["WARPS"], shared=attend_bytes(constants),
        args=[
            qkv, I64(qkv.stride(0)), keys, values, I64(keys.stride(0)), I64(keys.stride(1)), I32(heads.key),
            flat(slot, "slot", 1, qkv.device, torch.int64), flat(first, "first", rows, qkv.device, torch.int64),
            I32(heads.window), F32(heads.scale), F32(heads.softcap), I32(heads.rotary), cos, sin, *(norms or (None, None)),
            F32(eps), scratch, counters(qkv.device), out, I64(out.stride(0)),
        ],
    )  # fmt: skip
    return out


def norm_route_cut(rows: int, width: int) -> tuple[int, int]:
    """Rows of x that a block of norm_route has: as many as leave no block of 32 or 64 rows to wait for room beside the launch ahead.
    And elements of each that it multiplies with the router: few where rows are few, or share a block. Most widths then make a
    cluster."""
    each = 1 if rows <= 16 else 2 if rows <= 32 else 4
    size = 768 if 8 < rows <= 16 or width > 512 * PORTABLE_CLUSTER else 512
    return each, size


def norm_route_grid(rows: int, width: int) -> tuple[int, int]:
    """Blocks of a row, and how often as many."""
    each, size = norm_route_cut(rows, width)
    return -(-width // size), -(-rows // each)


def norm_route_parts(rows: int, width: int) -> int:
    """Blocks that write the normed rows."""
    return math.prod(norm_route_grid(rows, width))


def norm_route_constants(element: int, units: int, rows: int, width: int, clusters: bool) -> dict[str, int]:
    """With clusters the blocks of a row are one, where so many may be."""
    each, size = norm_route_cut(rows, width)
    constants = {"T": element, "ROWS": each, "SLICE": size, "UNITS": -(-(1 + units) // 8) * 8}
    blocks, _ = norm_route_grid(rows, width)
    return constants | ({"CLUSTERED": 1, "SPLITS": blocks} if clusters and 1 < blocks <= PORTABLE_CLUSTER else {})


def norm_route_scratch(rows: int, width: int, device: torch.device) -> Tensor:
    """What the blocks of a row leave for the one that ends last."""
    each, _ = norm_route_cut(rows, width)
    return torch.empty(norm_route_parts(rows, width) * each * (MAX_UNITS + 10), dtype=torch.float32, device=device)


def norm_route(
    x: Tensor,
    weight: Tensor,
    eps: float,
    router: RouterWeights,
    scratch: Tensor,
    *,
    threshold: Number,
    plus_one: bool = False,
    may_skip: Tensor | None = None,
    real: Tensor | None = None,
    needs: Tensor | None = None,
    arm: Handles | None = None,
    decided: tuple[Tensor, Tensor] | None = None,
    ready: Tensor | None = None,
    residual: Tensor | None = None,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """rms_norm(x) [M, H] and, of it, the router's (score [M], run [M]) as router_score gives them, in one launch.

    With a `residual`, what is normed is x + residual, rounded as in add_rms_norm; the sum goes to `total`. `ready` (int32, one
    entry) is raised by `norm_route_parts` once the normed rows are there, before the decision is: with it, `decided` must be
    given and, like `scratch`, outlive what starts then."""
    rows, width = x.shape
    if width != router.width:
        raise ValueError(f"rows of {width}; the router reads {router.width}")
    if ready is not None and decided is None:
        raise ValueError("ready without decided: memory that is freed here might be written beside the decision")
    out = torch.empty_like(x)
    score, run = decided or (
        torch.empty(rows, dtype=torch.float32, device=x.device), torch.empty(rows, dtype=torch.bool, device=x.device)
    )  # fmt: skip
    clusters = properties(device_index(x.device)).major >= 9
    constants = norm_route_constants(kind(x, "x"), router.units, rows, width, clusters) | _residual(residual)
    if arm is not None:
        constants["SET_CONDITION"] = 1
    launch(
        "norm_route", "norm_route", constants, x.device, early=arm is None,
        grid=norm_route_grid(rows, width), threads=256,
        args=[
            x, I64(x.stride(0)), I32(rows), I32(width), flat(weight, "weight", width, x.device, x.dtype), F32(eps),
            I32(int(plus_one)), out, I64(out.stride(0)), *_sum_args(x, residual, total), router.matrix,
            I32(router.matrix.shape[1]), router.outer, I32(router.units), router.bias, F32(router.eps), scratch,
            counters(x.device), *number(threshold, "threshold", x.device), score, run,
            flat(may_skip, "may_skip", rows, x.device, *MASK), flat(real, "real", rows, x.device, *MASK),
            flat(needs, "needs", 1, x.device, torch.int32), None if arm is None else arm.table,
            I32(0 if arm is None else arm.count), I32(0 if arm is None else int(arm.has_opposite)),
            flat(ready, "ready", 1, x.device, torch.int32),
        ],
    )  # fmt: skip
    return out, score, run
