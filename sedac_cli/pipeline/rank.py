"""Rank statistics with ties handled, because entropies and constant guesses have many.

spearman(torch.tensor([1., 2., 3.]), torch.tensor([2., 4., 9.]))     # 1.0
"""

from __future__ import annotations

import torch
from torch import Tensor


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1; equal values share the mean of their places."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation; 0 where one side is constant and there is nothing to correlate."""
    x, y = ranks(a), ranks(b)
    x, y = x - x.mean(), y - y.mean()
    scale = (x.square().sum() * y.square().sum()).sqrt()
    return float((x * y).sum() / scale) if scale > 0 else 0.0


def auc_low(guess: Tensor, low: Tensor) -> float:
    """Probability that a token marked low is guessed lower than one that is not; 0.5 is chance."""
    inside, outside = int(low.sum()), int((~low).sum())
    if inside == 0 or outside == 0:
        return 0.5
    above = ranks(guess)[~low].sum() - outside * (outside + 1) / 2
    return float(above / (inside * outside))
