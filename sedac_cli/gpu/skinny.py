"""Linear layers for few rows: the weights are read once at the speed of memory, and a gate can stop the launch on the device.

Rows 1..64, float16 and bfloat16, a hidden width divisible by 8; up to 8 rows go through cuda/skinny.cu, more through
cuda/batch_hopper.cu, or cuda/batch.cu on other chips.
`need` (int32, one entry, on the device) makes the launch conditional: it works iff need != 0. `settled`: the launch just ahead
does not write `need`, so weights may be asked for before it has ended. What is not computed is not touched, so a gated MLP that
adds to the residual in place costs nothing when it is skipped. `other`: what such a launch computes when it is not needed; a
stand-in is then no launch of its own. `norm`: x goes through this RMSNorm first, within the launch where its rows fit in shared
memory.

    y = skinny_linear(x, [q, k, v], [bq, bk, bv], norm=(weight, 1e-6, False))
    z = skinny_gated(x, gate, up, "silu", need=flag)
    skinny_linear(z, [down], residual=h, out=h, need=flag)
    z = skinny_gated(x, gate, up, "silu", need=flag, other=Other(a, activation="silu"))     # flag 0: h += silu(x a^T) b^T
    skinny_linear(z, [down], residual=h, out=h, need=flag, other=Other(b))
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sedac_cli.gpu.batch import COUNTERS, DECLARED, HopperShape, groups_of, hopper_shapes, shape_of
from sedac_cli.gpu.compile import F32, I32, I64, clusters_at_once, counters, device_index, kind, launch, properties
from sedac_cli.gpu.decode import rms_norm
from sedac_cli.gpu.tensors import flat

MAX_SKINNY_ROWS = 64
FEW_ROWS = 8
"""Up to here x is small beside the weights, and each block reads all of it."""
BATCH_ROWS = 32
"""Up to here a step was faster with batch.cu than with cuBLAS, on an H200, and a closed gate needs no node. vLLM's steps go by it."""
WARPS = 16
STAGES = 4
"""Steps in flight: 64 KiB a block of 512 threads."""
X_AHEAD = 2
"""Steps of x asked for ahead where it comes from L2, whose latency every step would pay."""
PENDING = -1
"""A flag that is being decided: a launch with `ready` works on under it, others wait for it."""
RowNorm = tuple[Tensor, float, bool]
"""Weight, epsilon, and whether the weight is stored less one."""
ACTIVATIONS = {"none": 0, "silu": 1, "gelu_tanh": 2, "gelu": 3}


@dataclass(frozen=True)
class Other:
    """act(x weight^T + bias), by a launch whose flag is against it."""

    weight: Tensor
    bias: Tensor | None = None
    activation: str = "none"


Others = tuple[Other, Other] | tuple[None, None]
"""For the two launches of an MLP."""


@dataclass(frozen=True)
class Cut:
    """How skinny.cu shares out the rows of W: `items` equal ones, each of up to 16 rows for each of its `tiles`, over `grid` blocks."""

    tiles: int
    items: int
    grid: int

    @property
    def loop(self) -> bool:
        return self.items > self.grid


def cut_of(rows: int, gated: bool, processors: int) -> Cut:
    """Two blocks a multiprocessor, with one item each where that is not too tall. Items are equal, not whole tiles of which some
    blocks have one more, because the slowest block ends the launch."""
    blocks = 2 * processors
    most = -(-rows // blocks)
    tiles = 1 if gated else min(2, -(-most // 16))
    items = min(blocks * -(-most // (16 * tiles)), -(-rows // 8))
    return Cut(tiles, items, min(items, blocks))


def skinny_constants(
    element: int,
    gated: bool,
    act: int,
    cut: Cut,
    x_source: int = 0,
    races: bool = False,
    other: int = 0,
    ahead: int = X_AHEAD,
) -> dict[str, int]:
    """`x_source`: 0 memory, 1 shared memory, 2 the same through a norm. `ahead`: steps of x asked for ahead, from memory alone."""
    return {
        "T": element, "TILES": cut.tiles, "GATED": int(gated), "ACT": act, "STAGES": STAGES // (2 if gated else cut.tiles),
        "X_AHEAD": 0 if x_source else ahead, "WARPS": WARPS, "LOOP": int(cut.loop), "XS": x_source, "RACES": int(races),
        "OTHER": other,
    }  # fmt: skip


def steps_ahead(width: int) -> int:
    """Of x. What comes behind an item's last step is the first of the next, so no more than the last warp has."""
    least = -(-(width - 32 * (WARPS - 1)) // (32 * WARPS))
    return min(X_AHEAD, max(1, least))


def skinny_bytes(constants: dict[str, int], held: int = 0) -> int:
    """Shared memory that holds what is in flight and, after it, rows of x."""
    per_step = 2 * (2 if constants["GATED"] else constants["TILES"])
    return constants["STAGES"] * per_step * 32 * constants["WARPS"] * 16 + (held if constants["XS"] else 0)


def room_for_x(constants: dict[str, int], per_processor: int) -> int:
    """Bytes of x that fit beside the rest, two blocks to a multiprocessor."""
    matrices = 2 if constants["GATED"] else constants["TILES"]
    sums = constants["WARPS"] * matrices * 512 + 256
    return per_processor // 2 - 1024 - sums - skinny_bytes(constants)


def has_hopper_products(device: torch.device) -> bool:
    """Whether batch_hopper.cu runs there."""
    return properties(device_index(device)).major == 9


def fast_rows(device: torch.device) -> int:
    """Up to so many rows the graph engine's steps go through these kernels, more through cuBLAS."""
    return MAX_SKINNY_ROWS if has_hopper_products(device) else BATCH_ROWS


def x_bytes(x: Tensor, width: int) -> int:
    """Of its rows in shared memory, where they lie 64 bytes further apart than they are long."""
    return x.shape[0] * (width * x.element_size() + 64)


def fits_skinny(x: Tensor) -> bool:
    """Whether the kernel takes these rows."""
    return (
        x.is_cuda
        and x.dtype in (torch.float16, torch.bfloat16)
        and x.dim() == 2
        and 0 < x.shape[0] <= MAX_SKINNY_ROWS
        and x.shape[1] % 8 == 0
        and x.stride(1) == 1
        and x.stride(0) % 8 == 0
        and x.data_ptr() % 16 == 0
    )


def skinny_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    out: Tensor | None = None,
    need: Tensor | None = None,
    settled: bool = False,
    norm: RowNorm | None = None,
    other: Other | None = None,
) -> Tensor:
    """[M, K] -> [M, sum of rows]: act(x W^T + b) of up to three matrices side by side, plus the residual. With `other`, a matrix of
    as many rows: x is [M, K + R], and the last R columns are what that one takes."""
    _check(x, weights, 0 if other is None else other.weight.shape[1])
    if not 0 < len(weights) <= 3:
        raise ValueError(f"{len(weights)} matrices: one, two or three")
    rows = [w.shape[0] for w in weights]
    out = torch.empty(x.shape[0], sum(rows), dtype=x.dtype, device=x.device) if out is None else out
    _check_rows(out, "out", x.shape[0], sum(rows), x)
    if residual is not None:
        _check_rows(residual, "residual", x.shape[0], sum(rows), x)
    if other is not None:
        _check_other(other, x, need)
        if len(weights) != 1 or other.weight.shape[0] != rows[0] or norm is not None:
            raise ValueError("instead of one matrix another of as many rows may stand, on x as it is")
    job = _Job(x, weights, list(biases or []), out, activation, residual, norm, other=other)
    job.launch(need, settled)
    return out


def skinny_gated(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    *,
    biases: tuple[Tensor, Tensor] | None = None,
    out: Tensor | None = None,
    need: Tensor | None = None,
    settled: bool = False,
    ready: tuple[Tensor, int] | None = None,
    racing: bool = False,
    norm: RowNorm | None = None,
    other: Other | None = None,
) -> Tensor:
    """[M, K] -> [M, N]: act(x gate^T) * (x up^T), both [N, K]. With `other` [R, K] -> [M, N + R]: what that one gives stands in the
    last R columns, and nobody may read the others.

    `ready`: a counter, and the value it has once the launch just ahead has written x. That launch goes on to write `need`, which was
    PENDING before, and the work runs beside it. `racing`: the same where x was there before that launch began."""
    _check(x, [gate, up])
    if gate.shape != up.shape:
        raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} differ")
    if norm is not None and (ready is not None or racing):
        raise ValueError("a launch that races its decision takes x as it is")
    width = gate.shape[0]
    if other is not None:
        _check_other(other, x, need)
        _check(x, [other.weight])
        width += other.weight.shape[0]
    out = torch.empty(x.shape[0], width, dtype=x.dtype, device=x.device) if out is None else out
    _check_rows(out, "out", x.shape[0], width, x)
    job = _Job(x, [gate, up], list(biases or []), out, activation, norm=norm, gated=True, other=other)
    job.launch(need, settled, ready, racing)
    return out


@dataclass(frozen=True)
class _Job:
    x: Tensor
    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    out: Tensor
    activation: str
    residual: Tensor | None = None
    norm: RowNorm | None = None
    gated: bool = False
    other: Other | None = None

    def launch(
        self,
        need: Tensor | None,
        settled: bool,
        ready: tuple[Tensor, int] | None = None,
        racing: bool = False,
    ) -> None:
        device = self.x.device
        races = need is not None and (racing or ready is not None) and properties(device_index(device)).major >= 9
        # Before Hopper no launch begins before the one ahead has ended.
        counter, parts = (ready if races else None) or (None, 0)
        flags = [flat(need, "need", 1, device, torch.int32), I32(int(settled))]
        awaited = [flat(counter, "ready", 1, device, torch.int32), I32(parts)]
        (self.few if self.x.shape[0] <= FEW_ROWS else self.many)(races, flags, awaited)

    def operands(self, x: Tensor) -> list[Any]:
        """What both kernels take first."""
        residual, out = self.residual, self.out
        w: list[Tensor | None] = [*self.weights, *[None] * (3 - len(self.weights))]
        b: list[Tensor | None] = [*self.biases, *[None] * (3 - len(self.biases))]
        n = [I32(0 if one is None else one.shape[0]) for one in w]
        return [
            x, I64(x.stride(0)), I32(x.shape[0]), I32(self.width), *w, *b, *n, residual,
            I64(0 if residual is None else residual.stride(0)), out, I64(out.stride(0)),
        ]  # fmt: skip

    @property
    def width(self) -> int:
        return self.weights[0].shape[1]

    @property
    def otherwise(self) -> int:
        """The kernels' constant OTHER."""
        return 0 if self.other is None else 1 + ACTIVATIONS[self.other.activation]

    def other_operands(self) -> list[Any]:
        """What both take last."""
        if self.other is None:
            return [None, None, I32(0), I32(0)]
        weight = self.other.weight
        return [weight, self.other.bias, I32(weight.shape[0]), I32(weight.shape[1])]

    def few(self, races: bool, flags: list[Any], awaited: list[Any]) -> None:
        x, norm = self.x, self.norm
        found = properties(device_index(x.device))
        rows = sum(w.shape[0] for w in (self.weights[:1] if self.gated else self.weights))
        cut = cut_of(rows, self.gated, found.multi_processor_count)
        form = (kind(x, "x"), self.gated, ACTIVATIONS[self.activation], cut)
        held = x_bytes(x, max(self.width, 0 if self.other is None else self.other.weight.shape[1]))
        fits = held <= room_for_x(skinny_constants(*form), found.shared_memory_per_multiprocessor)
        if norm is not None and (not fits or norm[0].data_ptr() % 16):
            x, norm = rms_norm(x, *norm), None
        constants = skinny_constants(
            *form,
            x_source=0 if not fits else 1 if norm is None else 2,
            races=races,
            other=self.otherwise,
            ahead=steps_ahead(self.width),
        )
        weight, eps, plus_one = norm or (None, 0.0, False)
        launch(
            "skinny", "skinny", constants, x.device, early=True, grid=(cut.grid,), threads=32 * constants["WARPS"],
            shared=skinny_bytes(constants, held),
            args=[
                *self.operands(x), *flags, I32(cut.items), *awaited, flat(weight, "norm", x.shape[1], x.device, x.dtype), F32(eps),
                I32(int(plus_one)), *self.other_operands(),
            ],
        )  # fmt: skip

    def many(self, races: bool, flags: list[Any], awaited: list[Any]) -> None:
        x = self.x if self.norm is None else rms_norm(self.x, *self.norm)
        (self.hopper if has_hopper_products(x.device) else self.batch)(x, races, flags, awaited)

    def batch(self, x: Tensor, races: bool, flags: list[Any], awaited: list[Any]) -> None:
        found = properties(device_index(x.device))
        shape = shape_of(x.shape[0], found.shared_memory_per_block_optin)
        tiles = shape.tiles([w.shape[0] for w in self.weights], self.gated)
        grid = shape.grid(tiles, self.width, found.multi_processor_count)
        launch(
            "batch", "batch", shape.constants(kind(x, "x"), self.gated, ACTIVATIONS[self.activation], races, self.otherwise), x.device,
            early=True, grid=(grid,), threads=shape.threads, shared=shape.shared,
            args=[
                *self.operands(x), *flags, I32(tiles), *awaited, torch.empty(shape.parts(grid), dtype=torch.float32, device=x.device),
                counters(x.device)[COUNTERS:], *self.other_operands(),
            ],
        )  # fmt: skip

    def hopper(self, x: Tensor, races: bool, flags: list[Any], awaited: list[Any]) -> None:
        groups = groups_of([w.shape[0] for w in self.weights], self.gated)
        form = (kind(x, "x"), self.gated, ACTIVATIONS[self.activation], races, self.otherwise)
        shape, constants, grid = _hopper_form(x.shape[0], groups, form, device_index(x.device))
        launch(
            "batch_hopper", "batch_hopper", constants, x.device, early=True, grid=(grid,), threads=shape.threads, shared=shape.shared,
            args=[*self.operands(x), *flags, I32(groups), *awaited, *self.other_operands()],
        )  # fmt: skip


@functools.cache
def _hopper_form(
    rows: int, groups: int, form: tuple[int, bool, int, bool, int], index: int
) -> tuple[HopperShape, dict[str, int], int]:
    """The first shape that leaves no tile for a second turn, with its constants and the blocks of its launch."""
    found = properties(index)
    alone = found.shared_memory_per_block_optin - DECLARED  # one block to a multiprocessor, however small its ring
    for shape in hopper_shapes(rows, groups, found.multi_processor_count, found.shared_memory_per_block_optin):
        constants = shape.constants(*form)
        at_once = clusters_at_once("batch_hopper", "batch_hopper", constants, index, shape.threads, alone)
        if shape.cluster == 1 or groups <= at_once * shape.groups:
            return shape, constants, min(groups, at_once) * shape.cluster
    raise AssertionError("a shape without clusters takes any number of groups")


def _check(x: Tensor, weights: Sequence[Tensor], beside: int = 0) -> None:
    if not fits_skinny(x):
        raise ValueError(
            f"x {tuple(x.shape)} {x.dtype}, strides {x.stride()} on {x.device}: the kernel takes 1..{MAX_SKINNY_ROWS} rows "
            "of float16 or bfloat16, of a width divisible by 8, on a GPU"
        )
    for w in weights:
        width = x.shape[1] - beside
        if w.dim() != 2 or w.shape[1] != width or width % 8 or w.dtype != x.dtype or not w.is_contiguous():
            raise ValueError(
                f"weight {tuple(w.shape)} {w.dtype} (dense: {w.is_contiguous()}) for rows of {width} {x.dtype}"
            )


def _check_other(other: Other, x: Tensor, need: Tensor | None) -> None:
    """The width is for the callers to check."""
    w, bias = other.weight, other.bias
    if need is None:
        raise ValueError("what a launch does instead needs a flag that is against it")
    if w.dim() != 2 or w.shape[1] % 8 or w.dtype != x.dtype or w.device != x.device or not w.is_contiguous():
        raise ValueError(
            f"the other weight {tuple(w.shape)} {w.dtype} on {w.device} for rows of {x.dtype} on {x.device}"
        )
    if bias is not None and (bias.shape != (w.shape[0],) or bias.dtype != x.dtype or bias.device != x.device):
        raise ValueError(f"the other bias is {tuple(bias.shape)} {bias.dtype} on {bias.device}")


def _check_rows(tensor: Tensor, name: str, rows: int, width: int, like: Tensor) -> None:
    if (
        tensor.shape != (rows, width)
        or tensor.dtype != like.dtype
        or tensor.device != like.device
        or tensor.stride(1) != 1
    ):
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}: expected [{rows}, {width}] {like.dtype}"
        )
