"""The operations of a decode step: kernels on a GPU, their plain-torch twins elsewhere.

Up to `skinny.fast_rows` our own linear kernels make the faster step. More rows go through cuBLAS; a gate then needs conditional
nodes, where the kernels just end at once.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from sedac_cli.gpu import decode, decode_reference, packed, reference, skinny, step
from sedac_cli.gpu.decode import Heads
from sedac_cli.gpu.entropy import fused_entropy
from sedac_cli.gpu.reference import Entropy
from sedac_cli.gpu.skinny import Other
from sedac_cli.gpu.step import Turns
from sedac_cli.runtime.graph.standard import Linear, Norm
from sedac_cli.runtime.graph.state import Burst, Choice, State

GATED = skinny.ACTIVATIONS.keys() - {"none"}


class Ops(Protocol):
    """`need`: the work is done iff it is not 0, and that of `other` iff it is; only where `stops` says that launches can be stopped.
    `norm`: x goes through it first."""

    stops: bool

    def linear(
        self, x: Tensor, linear: Linear, *, activation: str = "none", residual: Tensor | None = None, out: Tensor | None = None,
        need: Tensor | None = None, settled: bool = False, norm: Norm | None = None, other: Other | None = None,
    ) -> Tensor: ...  # fmt: skip

    def gated(
        self, x: Tensor, gate: Tensor, up: Tensor, activation: str, biases: tuple[Tensor, Tensor] | None,
        need: Tensor | None = None, settled: bool = False, ready: tuple[Tensor, int] | None = None, norm: Norm | None = None,
        other: Other | None = None,
    ) -> Tensor: ...  # fmt: skip

    def norm(self, x: Tensor, norm: Norm) -> Tensor: ...

    def attend(
        self, qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slot: Tensor, first: Tensor,
        norms: tuple[Norm, Norm] | None,
    ) -> Tensor: ...  # fmt: skip

    def entropy(self, logits: Tensor) -> Entropy: ...

    def step_begin(
        self, state: State, weight: Tensor | None, tables: Turns | None
    ) -> tuple[Tensor | None, Turns | None, Tensor]: ...

    def step_end(self, choice: Choice, state: State, ends: Tensor, pad: int, needs: Tensor, record: Burst) -> None: ...


def make_ops(rows: int, dtype: torch.dtype, device: torch.device) -> Ops:
    if device.type == "cpu":
        return TwinOps()
    if rows <= skinny.fast_rows(device) and dtype in (torch.float16, torch.bfloat16):
        return KernelOps()
    return WideOps()


class KernelOps:
    """Everything by the decode kernels."""

    stops = True

    def __init__(self) -> None:
        self.scratch: dict[tuple[int, int], Tensor] = {}

    def linear(
        self, x: Tensor, linear: Linear, *, activation: str = "none", residual: Tensor | None = None, out: Tensor | None = None,
        need: Tensor | None = None, settled: bool = False, norm: Norm | None = None, other: Other | None = None,
    ) -> Tensor:  # fmt: skip
        return skinny.skinny_linear(
            x, linear.weights, linear.biases, activation=activation, residual=residual, out=out, need=need, settled=settled,
            norm=_parts(norm), other=other,
        )  # fmt: skip

    def gated(
        self, x: Tensor, gate: Tensor, up: Tensor, activation: str, biases: tuple[Tensor, Tensor] | None,
        need: Tensor | None = None, settled: bool = False, ready: tuple[Tensor, int] | None = None, norm: Norm | None = None,
        other: Other | None = None,
    ) -> Tensor:  # fmt: skip
        return skinny.skinny_gated(
            x, gate, up, activation, biases=biases, need=need, settled=settled, ready=ready, norm=_parts(norm), other=other,
        )  # fmt: skip

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        return decode.rms_norm(x, norm.weight, norm.eps, norm.plus_one)

    def attend(
        self, qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slot: Tensor, first: Tensor,
        norms: tuple[Norm, Norm] | None,
    ) -> Tensor:  # fmt: skip
        key = (heads.group * heads.key, heads.size)
        if key not in self.scratch:
            self.scratch[key] = decode.attend_scratch(qkv.shape[0], heads, qkv.device)
        return decode.attend(qkv, heads, cos, sin, keys, values, slot, first, self.scratch[key], *_head_norms(norms))

    def entropy(self, logits: Tensor) -> Entropy:
        return fused_entropy(logits)

    def step_begin(
        self, state: State, weight: Tensor | None, tables: Turns | None
    ) -> tuple[Tensor | None, Turns | None, Tensor]:
        return step.step_begin(state, weight, tables)

    def step_end(self, choice: Choice, state: State, ends: Tensor, pad: int, needs: Tensor, record: Burst) -> None:
        step.step_end(choice, state, ends, pad, needs, record)


class WideOps(KernelOps):
    """Matrices by cuBLAS, the rest by the decode kernels."""

    stops = False

    def linear(
        self, x: Tensor, linear: Linear, *, activation: str = "none", residual: Tensor | None = None, out: Tensor | None = None,
        need: Tensor | None = None, settled: bool = False, norm: Norm | None = None, other: Other | None = None,
    ) -> Tensor:  # fmt: skip
        assert need is None
        x = x if norm is None else self.norm(x, norm)
        if residual is not None and activation == "none" and len(linear.weights) == 1 and linear.biases[0] is None:
            return torch.addmm(residual, x, linear.weights[0].t(), out=out)  # the sum is part of the product's launch
        parts = [functional.linear(x, w, b) for w, b in zip(linear.weights, linear.biases, strict=True)]
        y = decode_reference.activate(parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1), activation)
        if residual is not None:
            return torch.add(residual, y, out=out) if out is not None else residual + y
        return y if out is None else out.copy_(y)

    def gated(
        self, x: Tensor, gate: Tensor, up: Tensor, activation: str, biases: tuple[Tensor, Tensor] | None,
        need: Tensor | None = None, settled: bool = False, ready: tuple[Tensor, int] | None = None, norm: Norm | None = None,
        other: Other | None = None,
    ) -> Tensor:  # fmt: skip
        assert need is None
        x = x if norm is None else self.norm(x, norm)
        first, second = biases or (None, None)
        inward, beside = functional.linear(x, gate, first), functional.linear(x, up, second)
        if activation in GATED and gate.shape[0] % 8 == 0:
            return packed.activate_rows(inward, beside, activation, self.count(x.shape[0], x.device))
        return decode_reference.activate(inward, activation) * beside

    def count(self, rows: int, device: torch.device) -> Tensor:
        if (rows, 0) not in self.scratch:
            self.scratch[rows, 0] = torch.full((1,), rows, dtype=torch.int32, device=device)
        return self.scratch[rows, 0]


class TwinOps:
    """The same on a CPU; a launch that is not needed is a branch not taken."""

    stops = True

    def linear(
        self, x: Tensor, linear: Linear, *, activation: str = "none", residual: Tensor | None = None, out: Tensor | None = None,
        need: Tensor | None = None, settled: bool = False, norm: Norm | None = None, other: Other | None = None,
    ) -> Tensor:  # fmt: skip
        return decode_reference.skinny_linear(
            x, linear.weights, linear.biases, activation=activation, residual=residual, out=out, need=need, norm=_parts(norm),
            other=other,
        )  # fmt: skip

    def gated(
        self, x: Tensor, gate: Tensor, up: Tensor, activation: str, biases: tuple[Tensor, Tensor] | None,
        need: Tensor | None = None, settled: bool = False, ready: tuple[Tensor, int] | None = None, norm: Norm | None = None,
        other: Other | None = None,
    ) -> Tensor:  # fmt: skip
        return decode_reference.skinny_gated(
            x, gate, up, activation, biases=biases, need=need, norm=_parts(norm), other=other
        )

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        return decode_reference.rms_norm(x, norm.weight, norm.eps, norm.plus_one)

    def attend(
        self, qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slot: Tensor, first: Tensor,
        norms: tuple[Norm, Norm] | None,
    ) -> Tensor:  # fmt: skip
        return decode_reference.attend(qkv, heads, cos, sin, keys, values, slot, first, None, *_head_norms(norms))

    def entropy(self, logits: Tensor) -> Entropy:
        return reference.fused_entropy(logits)

    def step_begin(
        self, state: State, weight: Tensor | None, tables: Turns | None
    ) -> tuple[Tensor | None, Turns | None, Tensor]:
        return decode_reference.step_begin(state, weight, tables)

    def step_end(self, choice: Choice, state: State, ends: Tensor, pad: int, needs: Tensor, record: Burst) -> None:
        decode_reference.step_end(choice, state, ends, pad, needs, record)


def _parts(norm: Norm | None) -> skinny.RowNorm | None:
    return None if norm is None else (norm.weight, norm.eps, norm.plus_one)


def _head_norms(norms: tuple[Norm, Norm] | None) -> tuple[tuple[Tensor, Tensor] | None, float]:
    return (None, 0.0) if norms is None else ((norms[0].weight, norms[1].weight), norms[0].eps)
