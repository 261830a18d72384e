"""A gated MLP, and its stand-in, on packed rows whose number only the device knows: prefill without a host sync.

Rows are split by the decision; the MLP runs over those that stay and the stand-in over the others, each by grouped matrix
products that end at a count in device memory; then rows go back to their places.

    mlp = PackedMlp.of(layer.mlp, "silu")       # None: not two plain matrices in bfloat16 and a down projection, or more than these
    y = mlp(x, leave)                           # [N, H]; zero where leave, without a stand-in
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from sedac_cli.gpu.compile import I32, I64, kind, launch
from sedac_cli.gpu.route import route_merge, route_split, scatter_rows
from sedac_cli.gpu.skinny import ACTIVATIONS
from sedac_cli.gpu.tensors import flat

Pair = tuple[Tensor, Tensor, Tensor | None]
"""A stand-in as (a [r, H], b [H, r], bias [H])."""


@dataclass(frozen=True)
class PackedMlp:
    gate: Tensor
    up: Tensor
    down: Tensor
    activation: str

    @classmethod
    def of(cls, mlp: nn.Module, activation: str) -> PackedMlp | None:
        """From `gate_proj`, `up_proj`, `down_proj`: grouped products exist for bfloat16, without biases."""
        parts = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        for part in parts:
            if type(part) is not nn.Linear or part.bias is not None or part.weight.dtype != torch.bfloat16:
                return None
            if part.in_features % 8 or part.out_features % 8 or not part.weight.is_cuda:
                return None
        gate, up, down = (part.weight for part in parts if part is not None)
        return cls(gate, up, down, activation) if is_plain(mlp, activation) else None

    def __call__(self, x: Tensor, leave: Tensor, standin: Pair | None = None) -> Tensor:
        """[N, H] rows; `leave` [N] bool."""
        routed = route_split(x, leave)
        stay, go = routed.counts[0:1], routed.counts[1:2]
        z = activate_rows(
            grouped(routed.active, self.gate, stay), grouped(routed.active, self.up, stay), self.activation, stay
        )
        y = grouped(z, self.down, stay)
        if standin is None:
            return scatter_rows(y, routed.slot)
        a, b, bias = standin
        other = grouped(torch.nn.functional.silu(grouped(routed.exit, a, go)), b, go)
        return route_merge(y, other if bias is None else other + bias, routed.slot)


ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x, "silu": functional.silu, "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}  # fmt: skip
_plain: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()


@torch.inference_mode()
def is_plain(mlp: Any, activation: str) -> bool:
    """Whether the module computes down(act(gate(x)) * up(x)) and nothing else: measured once, on rows from small to large, since
    its parts may have these names and more be done with them (sparsity, multipliers, a norm, limits)."""
    parts = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    if any(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in parts):
        return False  # somebody listens to the parts, or has changed them
    known = _plain.setdefault(mlp, {})
    if activation not in known:
        weight = mlp.gate_proj.weight
        generator = torch.Generator(weight.device).manual_seed(0)
        x = torch.randn(64, weight.shape[1], dtype=torch.float32, device=weight.device, generator=generator)
        x = (x * torch.logspace(-1, 2, 64, device=weight.device).unsqueeze(1)).to(weight.dtype)
        gate, up, down = (part.weight for part in parts)
        expected = functional.linear(ACTS[activation](functional.linear(x, gate)) * functional.linear(x, up), down)
        try:
            found = type(mlp).forward(mlp, x)
        except Exception:  # it wants more than rows
            found = None
        same = isinstance(found, Tensor) and found.shape == expected.shape
        if same and found is not None:
            off = (found.float() - expected.float()).norm(dim=1) / expected.float().norm(dim=1)
            same = bool((off < 0.02).all())  # NaN is no agreement
        known[activation] = same
    return known[activation]


def grouped(rows: Tensor, weight: Tensor, count: Tensor) -> Tensor:
    """rows @ weight.T for the first `count` rows; what lies behind them is undefined, in and out."""
    multiply: Any = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    return multiply(rows, weight.t().unsqueeze(0), offs=count)


def activate_rows(gate: Tensor, up: Tensor, activation: str, count: Tensor) -> Tensor:
    """act(gate) * up for the first `count` rows, each product rounded as separate layers would. Both may be halves of one
    matrix."""
    rows, width = gate.shape
    alike = gate.shape == up.shape and gate.stride() == up.stride() and gate.stride(1) == 1
    if width % 8 or not alike or gate.stride(0) % 8 or gate.data_ptr() % 16 or up.data_ptr() % 16:
        raise ValueError(
            f"gate {tuple(gate.shape)} and up {tuple(up.shape)}: dense rows, alike, a width divisible by 8"
        )
    out = torch.empty(rows, width, dtype=gate.dtype, device=gate.device)
    if rows:
        slices = max(1, min(8, width // 4096))
        launch(
            "activate", "activate", {"T": kind(gate, "gate"), "ACT": ACTIVATIONS[activation]}, gate.device,
            grid=(rows, slices), threads=256,
            args=[gate, up, I64(gate.stride(0)), out, I32(width), flat(count, "count", 1, gate.device, torch.int32)],
        )  # fmt: skip
    return out
