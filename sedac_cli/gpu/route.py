"""Packing rows by a decision and putting them back, stable, with the counts on the device: no host sync anywhere.

Buffers are as large as the input; `counts` (int32: staying, leaving) says how much of each is valid, the rest is undefined.
`slot` is the way back: slot[i] >= 0 is row i's place among those that stay, -1 - slot[i] its place among the others.

    routed = route_split(hidden, decision)             # True leaves
    hidden = route_merge(routed.active, routed.exit, routed.slot)
    packed = gather_rows(hidden, scale)                # scale > 0 stays
    delta = scatter_rows(mlp(packed.rows), packed.slot)
"""

from __future__ import annotations

import torch
from torch import Tensor

from sedac_cli.gpu.compile import I32, I64, launch
from sedac_cli.gpu.reference import Packed, Routed
from sedac_cli.gpu.tensors import MASK, flat

THREADS = 256
WARPS = THREADS // 32


def route_split(hidden: Tensor, decision: Tensor, out: Routed | None = None) -> Routed:
    """[N, H] rows -> those with decision False (active) and True (exit), each in order, with their indices."""
    _check(hidden, "hidden")
    count, device = hidden.shape[0], hidden.device
    if out is None:
        index, slot = hidden.new_empty(2, count, dtype=torch.int64), hidden.new_empty(count, dtype=torch.int32)
        packed = hidden.new_empty(2, *hidden.shape)
        out = Routed(packed[0], index[0], packed[1], index[1], hidden.new_empty(2, dtype=torch.int32), slot)
    else:
        _check_out(out, hidden)
    keys = flat(decision, "decision", count, device, *MASK)
    _split(hidden, keys, out.active, out.active_indices, out.exit, out.exit_indices, out.slot, out.counts, key=0)
    return out


def route_merge(active: Tensor, exit: Tensor, slot: Tensor, out: Tensor | None = None) -> Tensor:
    """The rows of both buffers in their first order."""
    return _merge(active, exit, slot, out)


def gather_rows(hidden: Tensor, scale: Tensor, out: Packed | None = None) -> Packed:
    """[N, H] -> the rows with scale > 0, packed in order."""
    _check(hidden, "hidden")
    count, device = hidden.shape[0], hidden.device
    if out is None:
        out = Packed(
            hidden.new_empty(hidden.shape), hidden.new_empty(count, dtype=torch.int64),
            hidden.new_empty(2, dtype=torch.int32), hidden.new_empty(count, dtype=torch.int32),
        )  # fmt: skip
    else:
        _check_out(out, hidden)
    keys = flat(scale, "scale", count, device, torch.float32)
    _split(hidden, keys, out.rows, out.indices, None, None, out.slot, out.counts, key=1)
    return out


def scatter_rows(rows: Tensor, slot: Tensor, out: Tensor | None = None) -> Tensor:
    """Packed rows back in their places; the others become 0."""
    return _merge(rows, None, slot, out)


def _split(hidden, keys, stay, stay_index, leave, leave_index, slot, counts, key: int) -> None:
    count, width = hidden.shape
    if count == 0:
        counts.zero_()
        return
    unit = _unit(hidden, stay, *([] if leave is None else [leave]))
    size = hidden.element_size()
    per_block = min(THREADS, max(WARPS, -(-count // 2048)))
    launch(
        "route", "split", {"WIDTH": unit, "KEY": key, "TWO": int(leave is not None)}, hidden.device,
        grid=(-(-count // per_block),), threads=THREADS,
        args=[
            hidden, I64(hidden.stride(0) * size // unit), keys, I32(count), I32(width * size // unit), I32(per_block),
            stay, stay_index, leave, leave_index, slot, counts,
        ],
    )  # fmt: skip


def _merge(stay: Tensor, leave: Tensor | None, slot: Tensor, out: Tensor | None) -> Tensor:
    _check(stay, "packed rows")
    if not stay.is_contiguous():
        raise ValueError(f"packed rows have strides {stay.stride()}: they must be dense")
    if leave is not None and (leave.shape != stay.shape or leave.dtype != stay.dtype or not leave.is_contiguous()):
        raise ValueError(f"packed rows are {tuple(stay.shape)} {stay.dtype} and {tuple(leave.shape)} {leave.dtype}")
    count, width = stay.shape
    flat(slot, "slot", count, stay.device, torch.int32)
    if out is None:
        out = torch.empty_like(stay)
    elif out.shape != stay.shape or out.dtype != stay.dtype or out.device != stay.device or out.stride(-1) != 1:
        raise ValueError(
            f"out is {tuple(out.shape)} {out.dtype}: expected {tuple(stay.shape)} {stay.dtype} with dense rows"
        )
    if count == 0:
        return out
    unit = _unit(out, stay, *([] if leave is None else [leave]))
    size = stay.element_size()
    launch(
        "route", "merge", {"WIDTH": unit, "KEY": 0, "TWO": int(leave is not None)}, stay.device,
        grid=(-(-count // WARPS),), threads=THREADS,
        args=[
            stay, leave, slot, I32(count), I32(width * size // unit), out, I64(out.stride(0) * size // unit),
        ],
    )  # fmt: skip
    return out


def _unit(*tensors: Tensor) -> int:
    """The widest access, in bytes, that every row of every tensor starts and ends on."""
    size = tensors[0].element_size()
    facts = [tensors[0].shape[1] * size]
    for tensor in tensors:
        facts += [tensor.data_ptr(), tensor.stride(0) * size]
    for unit in (16, 8, 4, 2):
        if all(fact % unit == 0 for fact in facts):
            return unit
    raise ValueError(f"rows of {tensors[0].dtype} are not made of 2-byte units")


def _check(rows: Tensor, name: str) -> None:
    if not rows.is_cuda:
        raise RuntimeError(f"{name} is on {rows.device}: kernels take CUDA tensors, sedac_cli.gpu.reference the others")
    if rows.dim() != 2 or rows.shape[1] == 0 or (rows.shape[1] > 1 and rows.stride(1) != 1):
        raise ValueError(f"{name} {tuple(rows.shape)} with strides {rows.stride()}: expected [N, H] with dense rows")


def _check_out(out: Routed | Packed, hidden: Tensor) -> None:
    count = hidden.shape[0]
    for name, tensor in zip(out._fields, out, strict=True):
        if name in ("active", "exit", "rows"):
            flat(tensor, f"out.{name}", hidden.numel(), hidden.device, hidden.dtype)
        elif name == "counts":
            flat(tensor, "out.counts", 2, hidden.device, torch.int32)
        else:
            flat(tensor, f"out.{name}", count, hidden.device, torch.int32 if name == "slot" else torch.int64)
