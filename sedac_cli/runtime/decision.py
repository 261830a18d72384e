"""Which rows of a pass run their MLP, as the host sees it, and what becomes of the others.

It is found with one wait for the device, and kept for as many layers as the gate holds to it: a cascade with three checkpoints
waits four times in a pass, not once a layer.

    decision = Decision.of(state, layer, last)      # `last`: of the layer before, or None
    decision.everyone                               # the MLP is left alone
    y = decision.blend(standin, layer, x, mlp(x[decision.rows]) if decision.rows.numel() else None)
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sedac_cli.gates.base import TokenState
from sedac_cli.standins import StandIn


class Decision:
    """`scale` is the state's own tensor: a decision is for the layers up to the next one at which the rule is asked."""

    def __init__(self, scale: Tensor, layer: int):
        self.scale, self.layer = scale, layer
        self.skips = scale == 0
        self.skipped = self.skips.sum()

    @classmethod
    def of(cls, state: TokenState, layer: int, last: Decision | None) -> Decision:
        if last is not None and state.held and last.layer == layer - 1:
            last.layer = layer
            return last
        return cls(state.scale, layer)

    @functools.cached_property
    def _host(self) -> Tensor:
        """The one wait for a device."""
        return self.scale.cpu()

    @functools.cached_property
    def everyone(self) -> bool:
        """Every row runs unscaled."""
        return bool((self._host == 1).all())

    @functools.cached_property
    def rows(self) -> Tensor:
        """Those that run the MLP."""
        return torch.nonzero(self._host).squeeze(-1).to(self.scale.device, non_blocking=True)

    @functools.cached_property
    def away(self) -> Tensor:
        """Those that take the stand-in, or a share of it."""
        return torch.nonzero(self._host < 1).squeeze(-1).to(self.scale.device, non_blocking=True)

    def blend(
        self, standin: StandIn, layer: int, x: Tensor, result: Tensor | None, residual: Tensor | None = None
    ) -> Tensor:
        """scale * MLP + (1 - scale) * stand-in, with `result` the MLP's output for `rows`; rows of scale 1 take it unchanged.

        An MLP that adds the residual inside returns it with its rows, so there the stand-in gets it added too.
        """
        rows, away = self.rows.to(x.device), self.away.to(x.device)
        out = torch.zeros_like(x) if residual is None else residual
        instead = standin.rows(layer, x[away])  # a stand-in costs too: only where it is taken
        if instead is not None:
            out = out.index_add(0, away, instead.to(out.dtype))
        if result is None:
            return out
        ran = result.reshape(-1, x.shape[-1])
        out = out.to(ran.dtype)
        if len(rows) + len(away) > len(x):  # some rows take a share of both
            weight = self.scale.to(x.device)[rows].unsqueeze(-1).to(ran.dtype)
            ran = torch.where(weight == 1, ran, weight * ran + (1 - weight) * out[rows])
        return out.index_copy(0, rows, ran)
