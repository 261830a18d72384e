"""The LREProbe and the per-layer router as single launches: projection, norm, head, threshold, latch and "any token left?".

Up to 8 rows, and always for float32 or unaligned rows, the projection is plain float32 arithmetic with float32 weights:
equal to the twin but for the order of additions. More rows go to the tensor cores. There the weight is kept as hi + lo in the
hidden state's dtype ("split", the default: a weight loses 2^-17 of itself in bfloat16, 2^-22 in float16, less than the order of
additions costs) or rounded once ("plain": 2^-9 and 2^-12; half the weight traffic). Sums are float32 everywhere.

    weights = ProbeWeights.pack(probe, device)
    risk = probe_risk(hidden, weights, threshold=0.8, latched=latched, needs=flag)
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from sedac_cli.gpu.compile import (
    F32,
    I32,
    MAX_ROWS,
    counters,
    device_index,
    kind,
    launch,
    properties,
    refuse_in_capture,
)
from sedac_cli.gpu.tensors import MASK, Number, Rows, buffer, flat, number

FEW_ROWS = 8
"""Up to here one block per (row, rank) beats a tensor-core tile, whose fixed cost is the pipeline's fill."""
EIGHT_ROWS = 512
"""Up to here, on a chip with warpgroup products, the eight blocks of a tile are a cluster."""
ROUTER_THREADS = 512
ROUTER_SLICE = 256
"""Of the hidden axis, where a row's router is spread over blocks."""
ROUTER_ROWS = 32
"""Up to here it is: one block for each of 32 rows leaves 100 multiprocessors idle."""
MAX_UNITS = 64
MAX_RANK = 256
Precision = Literal["split", "plain"]


class Handles(Protocol):
    """What a kernel needs to arm IF nodes itself; `conditional.Conditions` is one."""

    table: Tensor
    count: int
    has_opposite: bool


@dataclass
class ProbeWeights:
    """A probe's parameters as the kernel reads them, on one device."""

    width: int
    rank: int
    full: Tensor
    """[RP, padded] float32, zero where rank and width end."""
    constants: Tensor
    """bias[RP], gamma * head[RP], beta . head + head bias, eps."""
    halves: dict[torch.dtype, Tensor] = field(default_factory=dict)
    """[2, RP, padded]: hi and lo, made at first use of a dtype."""

    @classmethod
    def pack(cls, probe: Any, device: torch.device | str) -> ProbeWeights:
        """From anything with `proj`, `norm` and `head`, such as LREProbe."""
        proj, norm, head = probe.proj, probe.norm, probe.head
        weight = proj.weight.detach().to(device=device, dtype=torch.float32)
        rank, width = weight.shape
        if rank > MAX_RANK:
            raise ValueError(f"a probe of rank {rank}: the kernel goes up to {MAX_RANK}")
        padded_rank, padded = -(-rank // 64) * 64, -(-width // 64) * 64
        full = torch.zeros(padded_rank, padded, dtype=torch.float32, device=device)
        full[:rank, :width] = weight
        constants = torch.zeros(2 * padded_rank + 2, dtype=torch.float32, device=device)
        scale = head.weight.detach().to(constants).flatten()
        if proj.bias is not None:
            constants[:rank] = proj.bias.detach().to(constants)
        constants[padded_rank : padded_rank + rank] = norm.weight.detach().to(constants) * scale
        constants[2 * padded_rank] = norm.bias.detach().to(constants) @ scale + head.bias.detach().to(constants)[0]
        constants[2 * padded_rank + 1] = norm.eps
        return cls(width, rank, full, constants)

    def half(self, dtype: torch.dtype) -> Tensor:
        if dtype not in self.halves:
            refuse_in_capture(f"this probe's weight in {dtype}")
            high = self.full.to(dtype)
            self.halves[dtype] = torch.stack([high, (self.full - high.float()).to(dtype)])
        return self.halves[dtype]


@dataclass(frozen=True)
class RouterWeights:
    """A router's parameters as the kernel reads them, float32, on one device."""

    width: int
    matrix: Tensor
    """[1 + units, padded]: the linear part first, then the hidden units."""
    outer: Tensor
    """[units], then the sum of each row of `matrix`: what a norm that is taken afterwards needs."""
    bias: Tensor
    eps: float = 1e-5

    @classmethod
    def pack(cls, router: Any, device: torch.device | str) -> RouterWeights:
        """From anything with `weight`, `inner`, `outer` and `bias`, such as the learned gate's Router."""
        inner = router.inner.detach()
        units, width = inner.shape
        if units > MAX_UNITS:
            raise ValueError(f"a router with {units} hidden units: the kernel goes up to {MAX_UNITS}")
        matrix = torch.zeros(1 + units, -(-width // 4) * 4, dtype=torch.float32, device=device)
        matrix[0, :width], matrix[1:, :width] = router.weight.detach(), inner
        outer = torch.cat([router.outer.detach().to(matrix), matrix.sum(dim=1)])
        return cls(width, matrix, outer, router.bias.detach().to(matrix).reshape(1).clone())

    @property
    def units(self) -> int:
        return self.matrix.shape[0] - 1


def probe_risk(
    hidden: Tensor,
    weights: ProbeWeights,
    *,
    threshold: Number | None = None,
    latched: Tensor | None = None,
    may_skip: Tensor | None = None,
    real: Tensor | None = None,
    needs: Tensor | None = None,
    arm: Handles | None = None,
    precision: Precision = "split",
    out: Tensor | None = None,
) -> Tensor:
    """Risk of every row of [N, H] or [B, T, H], float32.

    With a threshold: latched |= (risk < threshold) & may_skip, and needs (int32, one entry) becomes 1 if any `real` token is
    not latched (or, with nothing to latch, does not fire), else 0. `arm` sets those conditional nodes to the same value.
    """
    rows = Rows.of(hidden, "hidden")
    device = rows.tensor.device
    _check_width(rows, weights.width, weights.full.device)
    risk = buffer(out, "risk", rows.shape, torch.float32, device)
    if _nothing_to_do(rows, needs, arm):
        return risk.view(hidden.shape[:-1])
    plan = _plan(rows, weights, precision, kind(hidden, "hidden"))
    constants = plan.constants | _conditional(arm)
    size = 0 if "CLUSTER" in constants else plan.grid[0] * plan.grid[2] * constants["ROWS"] * constants["RP"]
    partial = torch.empty(size, dtype=torch.float32, device=device) if size else None
    launch(
        "probe", "probe", constants, device, grid=plan.grid, threads=plan.threads, shared=plan.shared, early=arm is None,
        args=[
            *rows.args(), I32(rows.count), I32(rows.width), plan.weight, I32(weights.full.shape[1]), weights.constants,
            I32(weights.rank), partial, counters(device),
            *number(float("-inf") if threshold is None else threshold, "threshold", device), risk,
            flat(latched, "latched", rows.count, device, *MASK), *_tail(rows, may_skip, real, needs, arm),
        ],
    )  # fmt: skip
    return risk.view(hidden.shape[:-1])


def router_score(
    hidden: Tensor,
    weights: RouterWeights,
    *,
    threshold: Number = 0.0,
    may_skip: Tensor | None = None,
    real: Tensor | None = None,
    needs: Tensor | None = None,
    arm: Handles | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    scratch: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Score (float32) and run (bool: not score > threshold, and wherever a token may not skip) of every row. NaN runs."""
    rows = Rows.of(hidden, "hidden")
    device = rows.tensor.device
    _check_width(rows, weights.width, weights.matrix.device)
    given = out or (None, None)
    score = buffer(given[0], "score", rows.shape, torch.float32, device)
    run = buffer(given[1], "run", rows.shape, torch.bool, device)
    shape = hidden.shape[:-1]
    if _nothing_to_do(rows, needs, arm):
        return score.view(shape), run.view(shape)
    if rows.count <= ROUTER_ROWS:
        _router_few(rows, weights, threshold, score, run, _tail(rows, may_skip, real, needs, arm), arm, scratch)
        return score.view(shape), run.view(shape)
    size = _rows_of_a_block(rows, weights)
    blocks = -(-rows.count // size)
    _check_tiles(blocks)
    launch(
        "router", "router", {"T": kind(hidden, "hidden"), "ROWS": size} | _conditional(arm), device, grid=(blocks,),
        threads=ROUTER_THREADS, shared=router_bytes(size, weights.width),
        args=[
            *rows.args(), I32(rows.count), I32(rows.width), weights.matrix, weights.outer, I32(weights.units), weights.bias,
            F32(weights.eps), counters(device), *number(threshold, "threshold", device), score, run,
            *_tail(rows, may_skip, real, needs, arm),
        ],
    )  # fmt: skip
    return score.view(shape), run.view(shape)


def _router_few(
    rows: Rows,
    weights: RouterWeights,
    threshold: Number,
    score: Tensor,
    run: Tensor,
    tail: list[Tensor | np.generic | None],
    arm: Handles | None,
    scratch: Tensor | None,
) -> None:
    """One block a row reads its weights through one multiprocessor; slices of the row have as many as there are of them."""
    device, slices = rows.tensor.device, -(-rows.width // ROUTER_SLICE)
    constants = {"T": kind(rows.tensor, "hidden"), "SLICE": ROUTER_SLICE, "UNITS": -(-(1 + weights.units) // 8) * 8}
    partial = router_scratch(rows.count, weights, device) if scratch is None else scratch
    launch(
        "router_few", "router_few", constants | _conditional(arm), device, grid=(slices, rows.count), threads=256,
        early=arm is None,
        args=[
            *rows.args(), I32(rows.width), weights.matrix, I32(weights.matrix.shape[1]), weights.outer, I32(weights.units),
            weights.bias, F32(weights.eps), partial, counters(device), *number(threshold, "threshold", device), score, run, *tail,
        ],
    )  # fmt: skip


def router_scratch(rows: int, weights: RouterWeights, device: torch.device) -> Tensor:
    """What the blocks of up to ROUTER_ROWS rows leave for the one that ends last."""
    slices, numbers = -(-weights.width // ROUTER_SLICE), -(-(1 + weights.units) // 8) * 8 + 2
    return torch.empty(rows * slices * numbers, dtype=torch.float32, device=device)


def router_bytes(rows: int, width: int) -> int:
    """Shared memory for the normed states of a block's rows."""
    return rows * -(-width // 4) * 16


def _rows_of_a_block(rows: Rows, weights: RouterWeights) -> int:
    """One while that fills the chip; then as many as fit, so that the weights are read less often."""
    found = properties(device_index(rows.tensor.device))
    for size in (8, 4, 2):
        fits = router_bytes(size, weights.width) + 4096 <= found.shared_memory_per_block_optin
        if fits and rows.count >= size * found.multi_processor_count:
            return size
    return 1


@dataclass(frozen=True)
class _Plan:
    constants: dict[str, int]
    grid: tuple[int, int, int]
    threads: int
    shared: int
    weight: Tensor


def _plan(rows: Rows, weights: ProbeWeights, precision: Precision, element: int) -> _Plan:
    """How the projection is cut; the two ways are described in probe.cu."""
    padded_rank, padded = weights.full.shape
    common = {"T": element, "RP": padded_rank}
    if precision not in ("split", "plain"):
        raise ValueError(f"precision '{precision}' is not known: split or plain")
    if element == 0 or rows.count <= FEW_ROWS or not rows.aligned:
        size, ranks = (1, 1) if rows.count <= FEW_ROWS else (8, 8)
        _check_tiles(-(-rows.count // size))
        constants = common | {"ROWS": size, "RANKS": ranks, "PARTS": 1, "STAGES": 1}
        return _Plan(constants, (-(-rows.count // size), -(-weights.rank // ranks), 1), 256, 0, weights.full)
    parts = 2 if precision == "split" else 1
    found = properties(device_index(rows.tensor.device))
    hopper = found.major == 9 and padded_rank == 64
    shape = tile_shape(rows.count, padded_rank, padded, found.multi_processor_count, hopper)
    while shape.stages > 2 and shape.shared(parts) + 1024 > found.shared_memory_per_block_optin:
        shape = replace(shape, stages=shape.stages - 1)
    tiles = -(-rows.count // shape.size)
    _check_tiles(tiles)
    grid = (tiles, padded_rank // 64, shape.splits)
    weight = weights.half(rows.tensor.dtype)
    return _Plan(common | shape.constants(parts), grid, 2 * shape.size, shape.shared(parts), weight)


@dataclass(frozen=True)
class TileShape:
    """Rows of a tensor-core tile, how many blocks share its hidden axis, and steps of 64 that are loaded ahead."""

    size: int
    splits: int
    stages: int
    cluster: bool = False
    """Products by warpgroups (sm_90a alone), and the blocks of a tile are a cluster that meets in shared memory."""

    def shared(self, parts: int) -> int:
        """Dynamic shared memory."""
        return shared_bytes(self.size, parts, self.stages, self.cluster)

    def constants(self, parts: int) -> dict[str, int]:
        known = {"ROWS": self.size, "RANKS": 0, "PARTS": parts, "STAGES": self.stages}
        return known | ({"CLUSTER": self.splits} if self.cluster else {})


EIGHT, FOUR, TWO = (TileShape(64, splits, stages, cluster=True) for splits, stages in ((8, 4), (4, 4), (2, 6)))
"""What a Hopper chip takes: clusters of eight up to EIGHT_ROWS, of four as long as all run at once, then of two. Microseconds on
one H200 at 1024, 2048, 4096 and 8192 rows of 3584 (benchmarks/results/gpu_kernel_sweep.json): four 8.6, 11.0, 18.5, 29.9; two
12.4, 12.8, 13.3, 26.0; no cluster 14.8, 14.9, 19.7, 30.3. At 9 and 64 rows no cluster takes 11.1 and 11.7, four 6.5 and 6.7,
eight 5.6 and 5.5; at 512 four 7.3, eight 6.2 (samples not kept)."""


def tile_shape(count: int, padded_rank: int, padded: int, multiprocessors: int, hopper: bool = False) -> TileShape:
    """About two blocks per multiprocessor, so that one loads while the other starts or ends; one where tiles are small.

    More than 16 parts per tile would cost more to add up than they save.
    """
    if hopper:
        if count <= EIGHT_ROWS:
            return EIGHT
        return FOUR if -(-count // FOUR.size) * FOUR.splits <= multiprocessors else TWO
    size = 32 if count <= 256 else 64
    tiles = -(-count // size) * (padded_rank // 64)
    blocks = multiprocessors * (1 if size == 32 else 2)
    return TileShape(size, max(1, min(16, padded // 64, blocks // tiles)), 4)


def shared_bytes(size: int, parts: int, stages: int, cluster: bool = False) -> int:
    """What a tensor-core tile keeps in shared memory; STAGE_BYTES in probe.cu, as often as there are stages. A warpgroup's
    tiles start on 1024 bytes."""
    return stages * (size + 64 * parts) * 128 + 1024 * cluster


def _check_width(rows: Rows, width: int, device: torch.device) -> None:
    if rows.width != width:
        raise ValueError(f"hidden states of width {rows.width}; the weights read {width}")
    if rows.tensor.device != device:
        raise ValueError(f"hidden states are on {rows.tensor.device}, the weights on {device}")


def _check_tiles(tiles: int) -> None:
    if tiles > MAX_ROWS:
        raise ValueError(f"{tiles} tiles of rows in one call: at most {MAX_ROWS}")


def _nothing_to_do(rows: Rows, needs: Tensor | None, arm: Handles | None) -> bool:
    """No row: no token needs anything, and nothing is launched."""
    if rows.count:
        return False
    if arm is not None:
        raise ValueError("no rows: there is nothing to arm conditional nodes with")
    if needs is not None:
        needs.zero_()
    return True


def _conditional(arm: Handles | None) -> dict[str, int]:
    return {} if arm is None else {"SET_CONDITION": 1}


def _tail(
    rows: Rows, may_skip: Tensor | None, real: Tensor | None, needs: Tensor | None, arm: Handles | None
) -> list[Tensor | np.generic | None]:
    """The arguments both kernels end with."""
    device = rows.tensor.device
    return [
        flat(may_skip, "may_skip", rows.count, device, *MASK),
        flat(real, "real", rows.count, device, *MASK),
        flat(needs, "needs", 1, device, torch.int32),
        None if arm is None else arm.table,
        I32(0 if arm is None else arm.count),
        I32(0 if arm is None else int(arm.has_opposite)),
    ]
