"""The entropy gate (V9): skip where the logit lens is sure, the state is calm, and most of the model lies behind.

EntropyGate(28, HeadLens(decoder), mean=6.0, sd=2.0, threshold=0.7)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from sedac_cli.errors import UsageError
from sedac_cli.gates.base import Gate, Guards, TokenState, check_layers
from sedac_cli.gates.lens import Lens
from sedac_cli.gates.options import REQUIRED, Option, check_options
from sedac_cli.gpu.reference import entropy_decision

GUARDS = Guards(sinks=4, first=2, last=1)


class EntropyGate(Gate):
    """At a checked layer l, with H the lens entropy (bits) of h_l, dh = h_l - h_{l-1} and p = l / L:

        conf = sigmoid(2 (mu_l - H) / sd_l)      stab = 1 / (1 + |dh| / |h_l|)
        skip iff conf * stab * p > threshold - 0.2 p
        load = 0.5 (1 - conf) + 0.3 (1 - stab) + 0.2 (1 - p)      reported, not decided on

    A decision holds until the next checked layer, where it is taken afresh: nothing latches, since V9 splits tokens off
    for a span of layers and merges them again. Anchor layers, every `anchor_interval`-th from 0, run for every token, and
    the layer after an anchor is where the gate looks (unless `checks` names other layers): the state it sees, and the
    change it measures, come out of a layer that ran whole. `anchor_interval` 1 thus never skips; 0 means no anchors
    and a check at every layer. No check is earlier than min_exit_layer; protected layers run, whatever holds.

    Since conf * stab <= 1, no check can fire where 1.2 p <= threshold (with 0.7, before 58 % of the depth): the default
    checks leave those out, for a look through the output head is dear.
    """

    name = "entropy"
    decides = True
    summary = "a logit-lens entropy, the change of the state and the depth decide for the layers up to the next check"
    form = "entropy:mean=6,sd=2,threshold=0.7"
    options = (
        Option("mean", list, REQUIRED, "mu: mean lens entropy in bits, one for all checks or one each (6.1/5.2/4)"),
        Option("sd", list, REQUIRED, "sd: standard deviation of the lens entropy, likewise", 0, open_low=True),
        Option("threshold", float, 0.7, "lower skips more", -1, 2),
        Option("anchor_interval", int, 4, "every so many layers one runs for every token; 0: none", 0),
        Option("min_exit_layer", int, 4, "first layer that may be checked and skipped", 1),
        Option("checks", list, None, "layers to check; unless given, the one after each anchor", 1),
        Option("lens", str, "head", "head: the model's own norm and head; or a folder of probes of the entropy"),
        Option("sinks", int, GUARDS.sinks, "first positions of a sequence that never skip", 0),
        Option("first", int, GUARDS.first, "first layers that always run", 0),
        Option("last", int, GUARDS.last, "last layers that always run", 0),
    )

    def __init__(
        self,
        num_layers: int,
        lens: Lens,
        mean: float | Mapping[int, float],
        sd: float | Mapping[int, float],
        threshold: float = 0.7,
        anchor_interval: int = 4,
        min_exit_layer: int = 4,
        checks: Iterable[int] | None = None,
        guards: Guards | None = None,
    ):
        super().__init__(num_layers, guards or GUARDS)
        named = ("threshold", "anchor_interval", "min_exit_layer")
        checked = check_options(
            dict(zip(named, (threshold, anchor_interval, min_exit_layer), strict=True)),
            [option for option in self.options if option.name in named],
            "gate 'entropy'",
        )
        self.threshold: float = checked["threshold"]
        self.anchor_interval: int = checked["anchor_interval"]
        self.min_exit_layer: int = checked["min_exit_layer"]
        self.lens = lens
        if checks is None:
            self.checks = self.default_checks(
                num_layers, self.threshold, self.anchor_interval, self.min_exit_layer, self.guards
            )
        else:
            self.checks = sorted(set(checks))
            check_layers(self.checks, num_layers, "gate 'entropy' checks")
            if self.checks and self.checks[0] < self.min_exit_layer:
                raise UsageError(
                    f"gate 'entropy' checks layer {self.checks[0]}, before min_exit_layer {min_exit_layer}"
                )
        blind = set(self.checks) - set(self.checks if (can := lens.layers()) is None else can)
        if blind:
            raise UsageError(f"gate 'entropy' checks layers {self.checks} but its lens has none for {sorted(blind)}")
        self._mean = torch.tensor(by_check(mean, self.checks, "mean"))
        self._sd = torch.tensor(by_check(sd, self.checks, "sd"))
        if not (self._sd > 0).all():
            raise UsageError("gate 'entropy': sd must be > 0")

    @classmethod
    def default_checks(
        cls, num_layers: int, threshold: float, anchor_interval: int, min_exit_layer: int, guards: Guards
    ) -> list[int]:
        """The layer after each anchor (every layer when there are none) from which something could be skipped."""
        return [
            layer
            for layer in range(max(1, min_exit_layer), num_layers - guards.last)
            if 1.2 * layer / num_layers > threshold
            and (anchor_interval == 0 or (anchor_interval > 1 and layer % anchor_interval == 1))
        ]

    def anchor(self, layer: int) -> bool:
        return self.anchor_interval > 0 and layer % self.anchor_interval == 0

    def reads(self, layer: int) -> bool:
        return layer in self.checks or layer + 1 in self.checks

    def holds(self, layer: int) -> bool:
        return not self.reads(layer) and self.anchor(layer) == self.anchor(layer - 1)

    def prepare(self, state: TokenState) -> None:
        state.memory["skips"] = torch.zeros_like(state.may_skip)
        for name in ("entropy", "confidence", "load"):
            state.memory[name] = torch.zeros_like(state.scale)

    def rule(self, layer: int, hidden: Tensor | None, state: TokenState) -> Tensor:
        memory = state.memory
        if layer in self.checks:
            assert hidden is not None
            index = self.checks.index(layer)
            entropy = self.lens(layer, hidden)
            confidence, load, skips = entropy_decision(
                entropy, hidden, memory["previous"], self._mean[index], self._sd[index],
                layer / self.num_layers, self.threshold,
            )  # fmt: skip
            memory["entropy"].copy_(entropy)
            memory["confidence"].copy_(confidence)
            memory["load"].copy_(load)
            memory["skips"].copy_(skips)
        if layer + 1 in self.checks:
            assert hidden is not None
            if "previous" in memory:
                memory["previous"].copy_(hidden)
            else:
                memory["previous"] = hidden.clone()
        if self.anchor(layer):
            return torch.ones_like(state.may_skip)
        return ~memory["skips"]

    def parameters(self) -> dict[str, Any]:
        return {
            "threshold": self.threshold,
            "anchor_interval": self.anchor_interval,
            "min_exit_layer": self.min_exit_layer,
            "checks": self.checks,
            "mean": self._mean.tolist(),
            "sd": self._sd.tolist(),
        }

    def to(self, device: torch.device | str) -> EntropyGate:
        self._mean = self._mean.to(device)
        self._sd = self._sd.to(device)
        self.lens = self.lens.to(device)
        return self

    def cost_per_token(self, hidden_size: int) -> dict[int, float]:
        """The lens, and two norms."""
        return {layer: self.lens.cost_per_token(layer, hidden_size) + 5.0 * hidden_size for layer in self.checks}


def by_check(values: float | Mapping[int, float], checks: list[int], what: str) -> list[float]:
    if not isinstance(values, Mapping):
        return [float(values)] * len(checks)
    if missing := sorted(set(checks) - set(values)):
        raise UsageError(f"gate 'entropy' checks layers {checks} but has no {what} for {missing}")
    return [float(values[layer]) for layer in checks]
