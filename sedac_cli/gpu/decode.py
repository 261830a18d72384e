"""What a decode step does between its matrices, one launch each: RMSNorm, rotary positions with the cache write, attention.

Float32, float16 and bfloat16; head sizes divisible by 16 up to 256; up to 16 query heads per key head. Positions and lengths
are read on the device, so one captured step serves every position.

    x = rms_norm(h, weight, 1e-6)
    rotate_and_store(qkv, heads, cos, sin, keys, values, slot)
    a = attend(qkv, heads, keys, values, slot, first, scratch)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sedac_cli.gpu.compile import F32, I32, I64, counters, kind, launch
from sedac_cli.gpu.tensors import flat

KEYS = 128
"""Keys a block of the attention kernel takes."""
MAX_HEAD, MAX_GROUP = 256, 16


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
    if x.shape[0]:
        threads = 128 if x.shape[1] <= 1024 else 512
        launch(
            "decode", "rms_norm", {"T": kind(x, "x"), "ENTRY": 1}, x.device, grid=(x.shape[0],), threads=threads,
            args=[
                x, I64(x.stride(0)), I32(x.shape[1]), flat(weight, "weight", x.shape[1], x.device, x.dtype), F32(eps),
                I32(int(plus_one)), out, I64(out.stride(0)),
            ],
        )  # fmt: skip
    return out


def rotate_and_store(
    qkv: Tensor,
    heads: Heads,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slot: Tensor,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
) -> None:
    """Rotate q of [M, q + k + v] in place; k, rotated, and v go to place `slot` of [M, key heads, places, size]."""
    q_norm, k_norm = norms or (None, None)
    table = heads.rotary
    for name, tensor in (("cos", cos), ("sin", sin)):
        flat(tensor, name, qkv.shape[0] * table, qkv.device, qkv.dtype)
    launch(
        "decode", "rotate", {"T": kind(qkv, "qkv"), "ENTRY": 2}, qkv.device,
        grid=(heads.query + 2 * heads.key, qkv.shape[0]), threads=64 if heads.size <= 64 else 128,
        args=[
            qkv, I64(qkv.stride(0)), I32(heads.query), I32(heads.key), I32(heads.size), I32(table), cos, sin, q_norm, k_norm,
            F32(eps), keys, values, I64(keys.stride(0)), I64(keys.stride(1)), flat(slot, "slot", 1, qkv.device, torch.int64),
        ],
    )  # fmt: skip


def attend_scratch(rows: int, heads: Heads, places: int, device: torch.device) -> Tensor:
    """What blocks leave for the one that ends last; may be shared by all layers of a step."""
    chunks = -(-places // KEYS)
    return torch.empty(rows * heads.key * chunks * heads.group * (heads.size + 2), device=device)


def attend(
    q: Tensor,
    heads: Heads,
    keys: Tensor,
    values: Tensor,
    slot: Tensor,
    first: Tensor,
    scratch: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """[M, query heads x size]: row m over places first[m]..slot of the cache (its last `window` of them, if there is one)."""
    rows, places = q.shape[0], keys.shape[2]
    shape = (rows, heads.query * heads.size)
    out = torch.empty(shape, dtype=q.dtype, device=q.device) if out is None else out
    constants = {"T": kind(q, "q"), "ENTRY": 3, "D": heads.size, "G": heads.group}
    chunks = -(-places // KEYS)
    if scratch.numel() < rows * heads.key * chunks * heads.group * (heads.size + 2):
        raise ValueError(f"scratch of {scratch.numel()} floats is too small for {rows} rows of {places} places")
    launch(
        "decode", "attend", constants, q.device, grid=(rows * heads.key, chunks), threads=KEYS,
        args=[
            q, I64(q.stride(0)), keys, values, I64(keys.stride(0)), I64(keys.stride(1)), I32(heads.key),
            flat(slot, "slot", 1, q.device, torch.int64), flat(first, "first", rows, q.device, torch.int64),
            I32(heads.window), F32(heads.scale), F32(heads.softcap), scratch, counters(q.device), out, I64(out.stride(0)),
        ],
    )  # fmt: skip
    return out
