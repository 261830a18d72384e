"""The trained stand-in: y = B silu(A x) + b, rank r per layer, a tenth of the MLP's cost or less.

It starts from the best linear map (closed-form ridge): silu(z) - silu(-z) = z, so a pair of units carries one linear
direction exactly, and training only has to add what is not linear.

    standin = LowRank.from_linear(weight, bias, rank=192)      # weight [H, H]: y = x @ weight
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LowRank(nn.Module):
    """The stand-in of one layer. Parameters: a [r, H], b [H, r], bias [H]."""

    def __init__(self, hidden_size: int, rank: int):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(rank, hidden_size))
        self.b = nn.Parameter(torch.zeros(hidden_size, rank))
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H] in the dtype of x (or of autocast)."""
        z = nn.functional.silu(nn.functional.linear(x, self.a.to(x.dtype)))
        return nn.functional.linear(z, self.b.to(x.dtype), self.bias.to(x.dtype))

    def flops(self) -> float:
        return 4.0 * self.a.numel()

    @classmethod
    @torch.no_grad()
    def from_linear(cls, weight: Tensor, bias: Tensor, rank: int, scale: Tensor) -> LowRank:
        """The rank/2 directions of y = x @ weight + bias that matter most; `scale` is the deviation of each input.

        Unpaired units (an odd rank) and directions the map does not use start as small noise with no effect.
        """
        size = weight.shape[0]
        out = cls(size, rank)
        u, s, v = torch.linalg.svd((scale.unsqueeze(1) * weight).double(), full_matrices=False)
        pairs = min(rank // 2, size)
        inward = (u[:, :pairs] / scale.double().unsqueeze(1)).T.float()
        outward = (v[:pairs].T * s[:pairs]).float()
        out.a[:pairs], out.a[pairs : 2 * pairs] = inward, -inward
        out.b[:, :pairs], out.b[:, pairs : 2 * pairs] = outward, -outward
        if 2 * pairs < rank:
            out.a[2 * pairs :] = torch.randn(rank - 2 * pairs, size) / size**0.5
        out.bias.copy_(bias)
        return out


class LowRankStandIns:
    """The stand-ins of a model, by layer; a layer without one returns zero."""

    def __init__(self, by_layer: dict[int, LowRank]):
        self.by_layer = by_layer

    def rows(self, layer: int, x: Tensor) -> Tensor | None:
        if layer not in self.by_layer:
            return None
        module = self.by_layer[layer]
        if module.a.device != x.device or module.a.dtype != x.dtype:
            self.by_layer[layer] = module = module.to(x.device, x.dtype)
        return module(x)

    def cost_per_token(self, layer: int) -> float:
        return self.by_layer[layer].flops() if layer in self.by_layer else 0.0
