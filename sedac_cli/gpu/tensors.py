"""What the kernel wrappers ask of their tensors, in one place: rows with any leading strides, masks, numbers, buffers.

rows = Rows.of(logits, "logits")          # [N, V] or [B, T, V], last axis dense
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sedac_cli.gpu.compile import F32, I32, I64

Number = float | Tensor
"""A constant of the launch, or one float32 on the device that may change between replays of a graph."""


@dataclass(frozen=True)
class Rows:
    """A tensor read row by row: [V], [N, V] or [B, T, V], whatever the strides of the leading axes."""

    tensor: Tensor
    count: int
    width: int
    outer: int
    inner: int
    per_outer: int

    @classmethod
    def of(cls, tensor: Tensor, name: str) -> Rows:
        if not tensor.is_cuda:
            raise RuntimeError(
                f"{name} is on {tensor.device}: kernels take CUDA tensors, sedac_cli.gpu.reference the others"
            )
        if tensor.dim() == 0:
            raise ValueError(f"{name} has no axis")
        if tensor.dim() == 1:
            tensor = tensor.unsqueeze(0)
        if tensor.dim() > 3:
            try:
                tensor = tensor.view(-1, *tensor.shape[-2:])
            except RuntimeError:
                raise ValueError(
                    f"{name} {tuple(tensor.shape)} has strides {tensor.stride()}: pass [B, T, width]"
                ) from None
        width = tensor.shape[-1]
        if width == 0:
            raise ValueError(f"{name} {tuple(tensor.shape)} has rows of no width")
        if width > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} has stride {tensor.stride(-1)} on its last axis: rows must be dense")
        if tensor.dim() == 2:
            return cls(tensor, tensor.shape[0], width, 0, tensor.stride(0), max(1, tensor.shape[0]))
        batch, length = tensor.shape[:2]
        return cls(tensor, batch * length, width, tensor.stride(0), tensor.stride(1), max(1, length))

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape[:-1]

    @property
    def aligned(self) -> bool:
        """Whether every row starts on 16 bytes."""
        size = self.tensor.element_size()
        return self.tensor.data_ptr() % 16 == 0 and all(
            extent <= 1 or stride * size % 16 == 0
            for extent, stride in zip(self.tensor.shape[:-1], self.tensor.stride()[:-1], strict=True)
        )

    def args(self) -> list[Tensor | np.generic]:
        """Pointer, strides and row grouping, as `struct Rows` takes them."""
        return [self.tensor, I64(self.outer), I64(self.inner), I32(self.per_outer)]


def number(value: Number, name: str, device: torch.device) -> list[Tensor | np.generic | None]:
    """Pointer and value, of which one counts."""
    if not isinstance(value, Tensor):
        return [None, F32(value)]
    if value.numel() != 1 or value.dtype != torch.float32 or value.device != device:
        raise ValueError(f"{name} is {tuple(value.shape)} {value.dtype} on {value.device}: one float32 on {device}")
    return [value, F32(0.0)]


def flat(tensor: Tensor | None, name: str, count: int, device: torch.device, *dtypes: torch.dtype) -> Tensor | None:
    """A dense tensor with one entry per row, or nothing; masks are bool or uint8."""
    if tensor is None:
        return None
    if tensor.dtype not in dtypes or tensor.device != device or tensor.numel() != count or not tensor.is_contiguous():
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device} (dense: {tensor.is_contiguous()}): "
            f"expected {count} x {' or '.join(map(str, dtypes))}, dense, on {device}"
        )
    return tensor


def buffer(given: Tensor | None, name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The caller's output buffer once it is known to fit, or a new one."""
    if given is None:
        return torch.empty(shape, dtype=dtype, device=device)
    checked = flat(given, f"out.{name}", shape.numel(), device, dtype)
    assert checked is not None
    return checked


MASK = (torch.bool, torch.uint8)
