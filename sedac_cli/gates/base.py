"""What every gate is: a pure tensor rule that says, layer by layer, which tokens run their MLP.

Always true: `decide` never moves data to the host; all state is tensors with one entry per token; the same object serves
simulation, the eager runtime, a CUDA graph and vLLM. Guards (attention sinks, protected layers, phase) are applied here,
once, so that no rule can forget them.

    state = gate.start(tokens=16, device=device)
    for layer in range(num_layers):
        gate.decide(layer, hidden, state)       # state.scale: 1 = run the MLP, 0 = take the stand-in
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from sedac_cli.errors import UsageError
from sedac_cli.gates.options import Option


@dataclass(frozen=True)
class Guards:
    """What no rule may override. `sinks`: the first positions of every sequence never skip."""

    sinks: int = 0
    first: int = 0
    last: int = 0
    prefill: bool = True
    decode: bool = True

    def __post_init__(self) -> None:
        for name in ("sinks", "first", "last"):
            if getattr(self, name) < 0:
                raise UsageError(f"guard '{name}' is {getattr(self, name)}: it cannot be negative")

    def protects(self, layer: int, num_layers: int) -> bool:
        return layer < self.first or layer >= num_layers - self.last


@dataclass
class TokenState:
    """One forward pass. Tokens are the rows of a [B, T] batch in row-major order."""

    shape: tuple[int, int]
    scale: Tensor
    exit_layer: Tensor
    may_skip: Tensor
    real: Tensor
    strict: Tensor | None = None
    """[tokens]: thresholds of single tokens; the stricter of a token's own and the gate's counts."""
    memory: dict[str, Tensor] = field(default_factory=dict)
    layer: int = -1
    """The last one decided."""
    held: bool = False
    """It was decided there as in the layer before: `scale` was not written."""


class Gate:
    """Base of all rules. A subclass sets `name`, and `rule`; it may say that it only looks at some layers."""

    name = "gate"
    summary = ""
    form = ""
    """How a user writes it."""
    options: tuple[Option, ...] = ()
    """What it can be told: one table serves parsing, files and `sedac ls gates`."""
    looks_at: Literal["entry", "mlp"] = "entry"
    """`entry`: the state entering the layer (the checkpoint rules). `mlp`: the MLP's own input."""
    trivial = False
    """True for a gate that never skips: the runtime then leaves the model alone, bit for bit."""
    strict_side: Literal["low", "high"] | None = None
    """Which of two thresholds is the stricter one; None: the rule has none."""
    floor = 0.0
    """Scales at or below this count as 0: the MLP is not run."""
    decides = False
    """True in a class whose own rule gives 0 or 1 and nothing between. One that derives from it may have another rule, and says it
    again if it has not."""

    def __init__(self, num_layers: int, guards: Guards | None = None):
        if num_layers < 1:
            raise UsageError(f"a gate for {num_layers} layers")
        self.num_layers = num_layers
        self.guards = guards or Guards()

    @property
    def blends(self) -> bool:
        """Whether a scale may lie between 0 and 1, so that MLP and stand-in are both needed."""
        return not type(self).__dict__.get("decides", False)

    def reads(self, layer: int) -> bool:
        """Whether the rule looks at the hidden state of this layer; elsewhere `hidden` may be None."""
        return False

    def start(
        self,
        tokens: int,
        device: torch.device | str,
        *,
        shape: tuple[int, int] | None = None,
        position: Tensor | None = None,
        real: Tensor | None = None,
        prefill: bool = True,
        force: Tensor | None = None,
        strict: Tensor | None = None,
    ) -> TokenState:
        """Fresh state for one forward pass. `position` counts from 0 in each sequence; padding is not `real`; tokens of
        `force` run every MLP whatever the rule says; `strict` holds thresholds of single tokens."""
        real = torch.ones(tokens, dtype=torch.bool, device=device) if real is None else real
        may_skip = real & (self.guards.prefill if prefill else self.guards.decode)
        if self.guards.sinks:
            position = torch.arange(tokens, device=device) if position is None else position
            may_skip = may_skip & (position >= self.guards.sinks)
        if force is not None:
            may_skip = may_skip & ~force
        state = TokenState(
            shape=shape or (1, tokens),
            scale=torch.ones(tokens, device=device),
            exit_layer=torch.full((tokens,), self.num_layers, dtype=torch.int32, device=device),
            may_skip=may_skip,
            real=real,
            strict=strict,
        )
        self.prepare(state)
        return state

    def holds(self, layer: int) -> bool:
        """Whether the rule says here what it said one layer before, and has nothing to remember: it is then not asked.

        With 28 layers and one token a cascade took 139 us per layer when every layer was asked, and takes 51 us.
        """
        return False

    def decide(self, layer: int, hidden: Tensor | None, state: TokenState) -> None:
        """Update `state.scale` for this layer's MLP, and `state.exit_layer` where it is the first one skipped."""
        before, state.layer = state.layer, layer
        protected = self.guards.protects(layer, self.num_layers)
        same = before == layer - 1 >= 0 and protected == self.guards.protects(before, self.num_layers)
        state.held = same and self.holds(layer)
        if state.held:
            return
        wanted = self.rule(layer, hidden, state)
        if protected:
            state.scale.fill_(1.0)
            return
        if wanted.dtype == torch.bool:
            away = state.may_skip > wanted  # may skip and is not wanted: one operation
            torch.logical_not(away, out=state.scale)
        else:
            wanted = torch.where(state.may_skip, wanted.to(state.scale.dtype), 1.0)
            state.scale.copy_(torch.where(wanted > self.floor, wanted, 0.0))
            away = state.scale == 0
        state.exit_layer.masked_fill_(away & (state.exit_layer > layer), layer)

    def prepare(self, state: TokenState) -> None:
        """Put what the rule remembers within a pass into `state.memory`."""

    def rule(self, layer: int, hidden: Tensor | None, state: TokenState) -> Tensor:
        """The scale each token should have at this layer, before guards; a rule that knows no halves says True for run.
        `hidden` is [tokens, hidden]."""
        raise NotImplementedError

    def parameters(self) -> dict[str, Any]:
        """What describes the gate in files and reports."""
        return {}

    def to(self, device: torch.device | str) -> Gate:
        """Move what the rule holds; called once when a runtime takes the gate."""
        return self

    def cost_per_token(self, hidden_size: int) -> dict[int, float]:
        """FLOPs of deciding, per token, by layer: they count against what is saved."""
        return {}


def stricter(a: Guards, b: Guards) -> Guards:
    """What both ask for."""
    return Guards(
        max(a.sinks, b.sinks),
        max(a.first, b.first),
        max(a.last, b.last),
        a.prefill and b.prefill,
        a.decode and b.decode,
    )


def check_layers(layers: Iterable[int], num_layers: int, what: str) -> None:
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise UsageError(f"{what}: layer {layer} does not exist, the model has layers 0..{num_layers - 1}")
