"""Linear layers for few rows: the weights are read once at the speed of memory, and a gate can stop the launch on the device.

Rows 1..64, float16 and bfloat16, a hidden width divisible by 8. `need` (int32, one entry, on the device) makes the launch
conditional: with when=True it works iff need != 0, with when=False iff need == 0. `settled`: the launch just ahead does not
write `need`, so weights may be asked for before it has ended. What is not computed is not touched, so a
gated MLP that adds to the residual in place costs nothing when it is skipped.

    y = skinny_linear(x, [q, k, v], [bq, bk, bv])
    z = skinny_gated(x, gate, up, "silu", need=flag)
    skinny_linear(z, [down], residual=h, out=h, need=flag)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sedac_cli.gpu.compile import I32, I64, device_index, kind, launch, properties
from sedac_cli.gpu.tensors import flat

MAX_SKINNY_ROWS = 64
FEW_ROWS = 8
"""Up to here weights are read faster than by cuBLAS, or as fast (benchmarks/results/gpu_decode.json)."""
WARPS = 16
STAGES = 4
"""Steps in flight: 64 KiB a block of 512 threads."""
PENDING = -1
"""A flag that is being decided: a launch with `ready` works on under it, others wait for it."""
ACTIVATIONS = {"none": 0, "silu": 1, "gelu_tanh": 2, "gelu": 3}


def skinny_constants(element: int, tiles: int, gated: bool, act: int, per_block: int, loop: bool) -> dict[str, int]:
    """Steps of x asked for ahead, X_AHEAD: a wide x comes from L2, whose latency every step would pay. Two tiles a block and one
    round of blocks: half-size blocks, twice as many at a time."""
    narrow = per_block == 2 and not loop
    stages, warps = (2 * STAGES, WARPS // 2) if narrow else (STAGES, WARPS)
    return {
        "T": element, "NT": tiles, "TILES": per_block, "GATED": int(gated), "ACT": act,
        "STAGES": max(2, stages // (2 if gated else per_block)), "X_AHEAD": 0 if tiles > 2 else 2 if narrow else 1,
        "WARPS": warps, "LOOP": int(loop),
    }  # fmt: skip


def skinny_bytes(constants: dict[str, int]) -> int:
    """Shared memory that holds what is in flight."""
    per_step = 2 * (2 if constants["GATED"] else constants["TILES"])
    return constants["STAGES"] * per_step * 32 * constants["WARPS"] * 16


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
    when: bool = True,
    settled: bool = False,
) -> Tensor:
    """[M, K] -> [M, sum of rows]: act(x W^T + b) of up to three matrices side by side, plus the residual."""
    _check(x, weights)
    if not 0 < len(weights) <= 3:
        raise ValueError(f"{len(weights)} matrices: one, two or three")
    rows = [w.shape[0] for w in weights]
    out = torch.empty(x.shape[0], sum(rows), dtype=x.dtype, device=x.device) if out is None else out
    _check_rows(out, "out", x.shape[0], sum(rows), x)
    if residual is not None:
        _check_rows(residual, "residual", x.shape[0], sum(rows), x)
    given = list(biases or [])
    _launch(
        x, weights, given, sum(-(-n // 16) for n in rows), False, activation, residual, out, need, when, settled,
    )  # fmt: skip
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
    when: bool = True,
    settled: bool = False,
    ready: tuple[Tensor, int] | None = None,
    racing: bool = False,
) -> Tensor:
    """[M, K] -> [M, N]: act(x gate^T) * (x up^T), both [N, K].

    `ready`: a counter, and the value it has once the launch just ahead has written x. That launch goes on to write `need`, which was
    PENDING before, and the work runs beside it. `racing`: the same, where x was there before that launch began."""
    _check(x, [gate, up])
    if gate.shape != up.shape:
        raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} differ")
    out = torch.empty(x.shape[0], gate.shape[0], dtype=x.dtype, device=x.device) if out is None else out
    _check_rows(out, "out", x.shape[0], gate.shape[0], x)
    if racing and need is not None:
        ready = (need, PENDING)  # no flag is less: the wait ends at once
    _launch(
        x,
        [gate, up],
        list(biases or []),
        -(-gate.shape[0] // 16),
        True,
        activation,
        None,
        out,
        need,
        when,
        settled,
        ready,
    )
    return out


def _launch(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    tiles: int,
    gated: bool,
    activation: str,
    residual: Tensor | None,
    out: Tensor,
    need: Tensor | None,
    when: bool,
    settled: bool,
    ready: tuple[Tensor, int] | None = None,
) -> None:
    rows = x.shape[0]
    groups = next(count for count in (1, 2, 4, 8) if rows <= 8 * count)
    # Two tiles a block once one each would be more blocks than run at a time.
    processors = properties(device_index(x.device)).multi_processor_count
    per_block = 2 if not gated and tiles > 2 * processors else 1
    items = -(-tiles // per_block)
    if ready is not None and properties(device_index(x.device)).major < 9:
        ready = None  # no launch begins before the one ahead has ended
    counter, parts = ready or (None, 0)
    constants = skinny_constants(
        kind(x, "x"), groups, gated, ACTIVATIONS[activation], per_block, items > 2 * processors
    )
    w: list[Tensor | None] = [*weights, *[None] * (3 - len(weights))]
    b: list[Tensor | None] = [*biases, *[None] * (3 - len(biases))]
    n = [I32(0 if one is None else one.shape[0]) for one in w]
    launch(
        "skinny", "skinny", constants, x.device, early=True, grid=(min(items, 2 * processors),), threads=32 * constants["WARPS"], shared=skinny_bytes(constants),
        args=[
            x, I64(x.stride(0)), I32(rows), I32(x.shape[1]), *w, *b, *n,
            residual, I64(0 if residual is None else residual.stride(0)), out, I64(out.stride(0)),
            flat(need, "need", 1, x.device, torch.int32), I32(int(when)),
            I32(2 if ready else int(settled)), I32(items), flat(counter, "ready", 1, x.device, torch.int32), I32(parts),
        ],
    )  # fmt: skip


def _check(x: Tensor, weights: Sequence[Tensor]) -> None:
    if not fits_skinny(x):
        raise ValueError(
            f"x {tuple(x.shape)} {x.dtype}, strides {x.stride()} on {x.device}: the kernel takes 1..{MAX_SKINNY_ROWS} rows "
            "of float16 or bfloat16, of a width divisible by 8, on a GPU"
        )
    for w in weights:
        if w.dim() != 2 or w.shape[1] != x.shape[1] or w.dtype != x.dtype or not w.is_contiguous():
            raise ValueError(
                f"weight {tuple(w.shape)} {w.dtype} (dense: {w.is_contiguous()}) for rows of {x.shape[1]} {x.dtype}"
            )


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
