"""From a wanted share of skipped MLPs to the limit on skip scores that gives it, tracked while the scores move.

A batch trains a whole range of budgets at once: every sequence draws its own share, and its limit is read from a table
of running quantiles. No budget term is needed in the loss: the limit is wherever the share is met.

    table = BudgetTable(governed=24, layers=28); limit = table.limits(shares)
"""

from __future__ import annotations

import torch
from torch import Tensor

from sedac_cli.pipeline.distill.blend import NEVER
from sedac_cli.pipeline.world import World

GRID = torch.linspace(0.02, 0.98, 49)
MOST_SCORES = 200_000
"""More than these are sampled: the quantiles do not change, the time does."""


class BudgetTable:
    """`share` counts skipped MLPs among all `layers`; only `governed` of them can be skipped."""

    def __init__(self, governed: int, layers: int, device: torch.device, smoothing: float = 0.7):
        self.ceiling = governed / layers
        self.grid = GRID.to(device)
        self.table = torch.zeros_like(self.grid)
        self.smoothing = smoothing
        self.seen = 0
        self.usable = torch.ones((), device=device)
        self.gain = torch.ones((), device=device)

    @torch.no_grad()
    def correct(self, wanted: Tensor, got: Tensor) -> None:
        """Quantiles lag behind moving scores; what is still off after them is taken out by feedback."""
        self.gain = (self.gain * (0.1 * (wanted - got) / wanted.clamp_min(0.02)).exp()).clamp(0.5, 2.0)

    @torch.no_grad()
    def update(self, scores: Tensor, world: World | None = None) -> None:
        """Blend in the quantiles of one pass's scores [governed, B, T], those of all processes; tokens that may never skip
        count as never."""
        world = world or World()
        flat, most = scores.flatten(), MOST_SCORES // world.size
        if flat.numel() > most:
            flat = flat[torch.randint(flat.numel(), (most,), device=flat.device)]
        flat = world.joined(flat)
        usable = flat > NEVER / 2
        found = torch.quantile(flat[usable].float(), 1 - self.grid)
        weight = self.smoothing if self.seen else 0.0
        self.table = weight * self.table + (1 - weight) * found
        self.usable = usable.float().mean()
        self.seen += 1

    def limits(self, shares: Tensor) -> Tensor:
        """Shares of all MLPs [B] -> limits [B, 1]. A share of 0 never skips."""
        inner = (self.gain * shares / (self.ceiling * self.usable)).clamp(0, 1)
        place = torch.searchsorted(self.grid, inner.contiguous()).clamp(1, len(self.grid) - 1)
        left, right = self.grid[place - 1], self.grid[place]
        part = ((inner - left) / (right - left)).clamp(0, 1)
        limit = torch.lerp(self.table[place - 1], self.table[place], part)
        return torch.where(shares > 0, limit, -NEVER).unsqueeze(1)
