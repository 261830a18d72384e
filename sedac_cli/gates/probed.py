"""What the probe gates share: an LREProbe and a threshold per checkpoint, fixed or adaptive.

`fixed`, `cascade` and `soft` differ only in what they make of `risk` and `limit`; everything else is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sedac_cli.errors import UsageError
from sedac_cli.gates.adaptive import AdaptiveThresholds
from sedac_cli.gates.base import Gate, Guards, TokenState, check_layers
from sedac_cli.probes import LREProbe


class ProbeGate(Gate):
    """Reads its probes at its checkpoints. `thresholds`: one number each, or an `AdaptiveThresholds` that finds them."""

    strict_side = "low"

    def __init__(
        self,
        num_layers: int,
        probes: Mapping[int, LREProbe],
        thresholds: Mapping[int, float] | AdaptiveThresholds,
        guards: Guards | None = None,
    ):
        super().__init__(num_layers, guards)
        self.adaptive = thresholds if isinstance(thresholds, AdaptiveThresholds) else None
        given = thresholds.rates if isinstance(thresholds, AdaptiveThresholds) else thresholds
        if not probes or set(probes) != set(given):
            raise UsageError(f"probes for layers {sorted(probes)} but thresholds for layers {sorted(given)}")
        check_layers(probes, num_layers, self.name)
        self.checkpoints = sorted(probes)
        self.probes = {layer: probes[layer] for layer in self.checkpoints}
        self._fixed = torch.tensor([float(given[layer]) for layer in self.checkpoints])
        if torch.isnan(self._fixed).any():
            raise UsageError("a threshold is NaN")

    @property
    def limits(self) -> Tensor:
        """[checkpoints]: the thresholds in force, on the device."""
        return self._fixed if self.adaptive is None else self.adaptive.limits

    @property
    def thresholds(self) -> dict[int, float]:
        """The thresholds in force, by layer. Reads the device: not for use within a pass."""
        return dict(zip(self.checkpoints, self.limits.tolist(), strict=True))

    def reads(self, layer: int) -> bool:
        return layer in self.probes

    def holds(self, layer: int) -> bool:
        return layer not in self.probes

    def look(self, layer: int, hidden: Tensor | None, state: TokenState, reached: Tensor) -> tuple[Tensor, Tensor]:
        """(risk [tokens], the limit it is held against); `reached` says whose risks the next limit may learn from."""
        assert hidden is not None
        index = self.checkpoints.index(layer)
        risk = self.probes[layer](hidden)
        state.memory["risk"] = risk
        limit = self.limits[index]
        if self.adaptive is not None:
            limit = limit.clone()
            self.adaptive.observe(index, risk, reached)
        if state.strict is not None:
            limit = torch.minimum(limit, state.strict)
        return risk, limit

    def parameters(self) -> dict[str, Any]:
        adaptive = {} if self.adaptive is None else {"adaptive": self.adaptive.parameters()}
        return {"checkpoints": self.checkpoints, "thresholds": self.limits.tolist(), **adaptive}

    def to(self, device: torch.device | str) -> ProbeGate:
        self._fixed = self._fixed.to(device)
        self.probes = {layer: probe.to(device) for layer, probe in self.probes.items()}
        if self.adaptive is not None:
            self.adaptive.to(device)
        return self

    def cost_per_token(self, hidden_size: int) -> dict[int, float]:
        return {layer: 2.0 * (hidden_size + 1) * probe.rank for layer, probe in self.probes.items()}
