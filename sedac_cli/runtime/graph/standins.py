"""Trained stand-ins as the decode kernels run them: two linear maps each.

Under a flag they are what the MLP's two launches do when they are not needed; alone they are two launches.

standins = LinearStandIns(plan.standin, torch.bfloat16, device)
first, second = standins.instead(layer)                 # for skinny_gated and skinny_linear; two times None where there is none
if layer in standins:
    standins(ops, layer, x, h, residual=h)              # h += stand-in
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sedac_cli.gpu.skinny import Other, Others
from sedac_cli.runtime.graph.standard import Linear, Norm, NotStandardError
from sedac_cli.standins import StandIn, ZeroStandIn
from sedac_cli.standins.lowrank import LowRank, LowRankStandIns


class HasLinear(Protocol):
    """The one operation that stand-ins are made of; `ops.Ops` have it."""

    def linear(
        self, x: Tensor, linear: Linear, *, activation: str = "none", residual: Tensor | None = None, out: Tensor | None = None,
        norm: Norm | None = None,
    ) -> Tensor: ...  # fmt: skip


class LinearStandIns:
    def __init__(self, standin: StandIn, dtype: torch.dtype, device: torch.device):
        # Exactly these two: one that derives from them may compute something else.
        if type(standin) not in (ZeroStandIn, LowRankStandIns):
            raise NotStandardError(f"the decode kernels cannot run stand-ins of kind {type(standin).__name__}")
        by_layer = standin.by_layer if isinstance(standin, LowRankStandIns) else {}
        self.pairs = {layer: pair(module, dtype, device) for layer, module in by_layer.items()}

    def __contains__(self, layer: int) -> bool:
        return layer in self.pairs

    def instead(self, layer: int) -> Others:
        """What the launches of a gated MLP do when their flag is against them."""
        if layer not in self.pairs:
            return None, None
        inward, outward = self.pairs[layer]
        return Other(inward.weights[0], activation="silu"), Other(outward.weights[0], outward.biases[0])

    def __call__(
        self, ops: HasLinear, layer: int, x: Tensor, out: Tensor, *, residual: Tensor | None = None, norm: Norm | None = None
    ) -> None:  # fmt: skip
        inward, outward = self.pairs[layer]
        z = ops.linear(x, inward, activation="silu", norm=norm)
        ops.linear(z, outward, residual=residual, out=out)


def pair(module: LowRank, dtype: torch.dtype, device: torch.device) -> tuple[Linear, Linear]:
    """The two maps, the rank filled up with zeros to what the kernels take. Where nothing is missing they are the module's own
    memory."""
    a, b, bias = (p.detach().to(device, dtype) for p in (module.a, module.b, module.bias))
    if missing := -module.rank % 8:
        a, b = torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing))
    return Linear([a.contiguous()], [None]), Linear([b.contiguous()], [bias])
