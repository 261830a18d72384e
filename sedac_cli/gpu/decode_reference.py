"""The plain-torch twins of the decode kernels: what they must equal, and what a decode step runs where there is no GPU.

`need` is read on the host here: on a CPU nothing is captured, and a layer that is not needed is really not computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from sedac_cli.gpu.decode import Heads
from sedac_cli.gpu.reference import router_score
from sedac_cli.gpu.skinny import Other, RowNorm
from sedac_cli.gpu.step import Turns
from sedac_cli.gpu.tensors import Number

if TYPE_CHECKING:
    from sedac_cli.runtime.graph.state import Burst, Choice, State


def activate(x: Tensor, name: str) -> Tensor:
    if name == "silu":
        return functional.silu(x)
    if name in ("gelu", "gelu_tanh"):
        return functional.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")
    return x


def idle(need: Tensor | None) -> bool:
    return need is not None and not bool(need)


def skinny_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    out: Tensor | None = None,
    need: Tensor | None = None,
    norm: RowNorm | None = None,
    other: Other | None = None,
) -> Tensor:
    out = x.new_empty(x.shape[0], sum(w.shape[0] for w in weights)) if out is None else out
    if idle(need):
        if other is not None:
            y = apply(other, x[:, weights[0].shape[1] :])
            out.copy_(y if residual is None else residual + y)
        return out
    x = x[:, : weights[0].shape[1]]
    x = x if norm is None else rms_norm(x, *norm)
    given = list(biases or []) or [None] * len(weights)
    y = torch.cat([functional.linear(x, w, b) for w, b in zip(weights, given, strict=True)], dim=-1)
    y = activate(y, activation)
    return out.copy_(y if residual is None else residual + y)


def skinny_gated(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    *,
    biases: tuple[Tensor, Tensor] | None = None,
    out: Tensor | None = None,
    need: Tensor | None = None,
    norm: RowNorm | None = None,
    other: Other | None = None,
) -> Tensor:
    inner = gate.shape[0]
    out = x.new_empty(x.shape[0], inner + (0 if other is None else other.weight.shape[0])) if out is None else out
    stopped = idle(need)
    if stopped and other is None:
        return out
    x = x if norm is None else rms_norm(x, *norm)
    if stopped and other is not None:
        out[:, inner:] = apply(other, x)
    else:
        first, second = biases or (None, None)
        out[:, :inner] = activate(functional.linear(x, gate, first), activation) * functional.linear(x, up, second)
    return out


def apply(other: Other, x: Tensor) -> Tensor:
    return activate(functional.linear(x, other.weight, other.bias), other.activation)


def rms_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool = False, out: Tensor | None = None) -> Tensor:
    wide = x.float()
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    y = (normal * (1.0 + weight.float())).to(x.dtype) if plus_one else weight * normal.to(x.dtype)
    return y if out is None else out.copy_(y)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, plus_one: bool = False
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight, eps, plus_one), total


def norm_route(
    x: Tensor,
    weight: Tensor,
    eps: float,
    router: Any,
    *,
    threshold: Number,
    plus_one: bool = False,
    may_skip: Tensor | None = None,
    real: Tensor | None = None,
    needs: Tensor | None = None,
    residual: Tensor | None = None,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    if residual is not None and total is not None:
        x = total.copy_(x + residual)
    y = rms_norm(x, weight, eps, plus_one)
    return y, *router_score(y, router, threshold=threshold, may_skip=may_skip, real=real, needs=needs)


def attend(
    qkv: Tensor,
    heads: Heads,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slot: Tensor,
    first: Tensor,
    scratch: Tensor | None = None,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    rows, places = qkv.shape[0], keys.shape[2]
    split = (heads.query * heads.size, heads.key * heads.size, heads.key * heads.size)
    q, k, v = (part.view(rows, -1, heads.size) for part in qkv.split(split, dim=-1))
    if norms is not None:
        q, k = (rms_norm(part, weight, eps) for part, weight in zip((q, k), norms, strict=True))
    cos, sin = cos.view(rows, 1, -1), sin.view(rows, 1, -1)

    def rotated(x: Tensor) -> Tensor:
        part, rest = x[..., : heads.rotary], x[..., heads.rotary :]
        half = heads.rotary // 2
        turned = torch.cat([-part[..., half:], part[..., :half]], dim=-1)
        return torch.cat([part * cos + turned * sin, rest], dim=-1)

    keys.index_copy_(2, slot.view(1), rotated(k).unsqueeze(2))
    values.index_copy_(2, slot.view(1), v.unsqueeze(2))
    query = rotated(q).reshape(rows, heads.key, heads.group, heads.size).float()
    scores = query @ keys.float().transpose(-1, -2) * heads.scale
    if heads.softcap:
        scores = torch.tanh(scores / heads.softcap) * heads.softcap
    place = torch.arange(places, device=qkv.device)
    begin = first if not heads.window else torch.maximum(first, slot + 1 - heads.window)
    seen = (place >= begin.view(-1, 1)) & (place <= slot)
    weights = torch.softmax(scores.masked_fill(~seen.view(rows, 1, 1, places), float("-inf")), dim=-1)
    y = (weights @ values.float()).reshape(rows, -1).to(qkv.dtype)
    return y if out is None else out.copy_(y)


def step_begin(
    state: State, weight: Tensor | None = None, tables: Turns | None = None
) -> tuple[Tensor | None, Turns | None, Tensor]:
    def rows(table: Tensor, index: Tensor) -> Tensor:
        return table[index.clamp(0, table.shape[0] - 1)]

    h = None if weight is None else rows(weight, state.tokens)
    turns = None if tables is None else (rows(tables[0], state.position), rows(tables[1], state.position))
    return h, turns, ~state.finished


def step_end(choice: Choice, state: State, ends: Tensor, pad: int, needs: Tensor, record: Burst) -> None:
    token = torch.where(state.finished, pad, choice.token)
    if ends.numel():
        state.finished.logical_or_((token.unsqueeze(1) == ends).any(dim=1))
    state.tokens.copy_(token)
    state.position.add_(1)
    state.slot.add_(1)
    record.tokens.copy_(token)
    record.entropy.copy_(choice.entropy)
    record.logprob.copy_(choice.logprob)
    record.needs.copy_(needs)
    record.finished.copy_(state.finished)
