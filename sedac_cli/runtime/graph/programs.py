"""A gate as a decode step runs it: flags on the device that say, layer by layer, whether any row still needs the MLP.

In a decode batch the MLP runs if any row needs it; rows that would have skipped then get the real one for free. Every gate
object works (`GateProgram` calls its own `decide`); the common ones have a form with a launch or none per layer, which must
decide the same.

    program = make_program(plan.gate, rows, device)
    program.begin(position, real); program.enter(0, h); entry = program.before_mlp(0, h, norm, ops)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sedac_cli.gates.base import Gate
from sedac_cli.gates.cascade import CascadeGate, FixedGate
from sedac_cli.gates.learned import LearnedGate
from sedac_cli.gates.simple import AlwaysGate, RandomGate
from sedac_cli.gpu import decode, reference
from sedac_cli.gpu.probe import MAX_RANK, MAX_UNITS, ProbeWeights, RouterWeights, probe_risk
from sedac_cli.gpu.skinny import PENDING
from sedac_cli.runtime.graph.ops import Ops
from sedac_cli.runtime.graph.standard import Norm


@dataclass(frozen=True)
class Entry:
    """What an MLP begins with: x, which goes through `norm` first unless that is None, and the flag it hangs on, if any. `settled`: no
    launch that may still run writes the flag; otherwise the one just ahead does. `ready`: x may be read once this counter has this
    value; that launch then only decides."""

    x: Tensor
    norm: Norm | None = None
    need: Tensor | None = None
    settled: bool = False
    ready: tuple[Tensor, int] | None = None


class Program:
    """Nothing is ever skipped. `needs[l]` is 1 where layer l's MLP ran; `source[l]` is the flag that governs layer l, or -1
    where the layer always runs."""

    def __init__(self, num_layers: int, rows: int, device: torch.device):
        self.num_layers, self.rows, self.device = num_layers, rows, device
        self.needs = torch.ones(num_layers, dtype=torch.int32, device=device)
        self.source = [-1] * num_layers

    def begin(self, position: Tensor, real: Tensor) -> None:
        """`position` [rows] in each sequence; rows that have ended are not `real` and need nothing."""

    def enter(self, layer: int, hidden: Tensor) -> None:
        """At checkpoint `layer`."""

    def before_mlp(self, layer: int, hidden: Tensor, norm: Norm, ops: Ops) -> Entry:
        return Entry(hidden, norm, self.flag(layer), settled=True)

    def decide_on(self, layer: int, x: Tensor) -> Tensor | None:
        """The flag, where the MLP's input has already been made by the model's own code."""
        return self.flag(layer)

    def flag(self, layer: int) -> Tensor | None:
        source = self.source[layer]
        return None if source < 0 else self.needs[source : source + 1]

    def scale(self, layer: int) -> Tensor | None:
        """[rows] share of the MLP, for gates that blend; None for those that decide."""
        return None

    def ran(self, needs: Tensor) -> Tensor:
        """[steps, flags] as recorded -> [steps, layers], True where the MLP ran."""
        open_layers = torch.tensor(self.source) < 0
        return open_layers | needs[:, torch.tensor(self.source).clamp_min(0)].bool()


class ForcedProgram(Program):
    """Flags that the caller sets between steps, or that follow from the gate's name alone: benchmarks, `always`, `random`."""

    def __init__(self, num_layers: int, rows: int, device: torch.device, gate: AlwaysGate | RandomGate | None = None):
        super().__init__(num_layers, rows, device)
        self.gate = gate
        self.source = list(range(num_layers))
        if gate is not None:
            self.source = [-1 if gate.guards.protects(index, num_layers) else index for index in range(num_layers)]
        if isinstance(gate, AlwaysGate):
            self.source = [-1 if index < gate.layer else s for index, s in enumerate(self.source)]

    def begin(self, position: Tensor, real: Tensor) -> None:
        if self.gate is None:
            return
        guards = self.gate.guards
        held = real & (position < guards.sinks) if guards.decode else real
        if isinstance(self.gate, RandomGate):
            coins = torch.rand(self.num_layers, self.rows, device=self.device) >= self.gate.probability
            self.needs.copy_(((coins & real) | held).any(dim=1))
        else:
            self.needs.copy_(held.any().expand(self.num_layers))


class GateProgram(Program):
    """Any gate, by its own rule."""

    def __init__(self, gate: Gate, rows: int, device: torch.device):
        super().__init__(gate.num_layers, rows, device)
        self.gate = gate.to(device)
        self.source = [
            -1 if gate.guards.protects(index, gate.num_layers) else index for index in range(gate.num_layers)
        ]

    def begin(self, position: Tensor, real: Tensor) -> None:
        self.real = real
        self.state = self.gate.start(
            self.rows, self.device, shape=(self.rows, 1), position=position, real=real, prefill=False
        )

    def enter(self, layer: int, hidden: Tensor) -> None:
        if self.gate.looks_at == "entry":
            self._decide(layer, hidden if self.gate.reads(layer) else None)

    def before_mlp(self, layer: int, hidden: Tensor, norm: Norm, ops: Ops) -> Entry:
        x = ops.norm(hidden, norm)
        return Entry(x, need=self.decide_on(layer, x))

    def decide_on(self, layer: int, x: Tensor) -> Tensor | None:
        if self.gate.looks_at == "mlp":
            self._decide(layer, x)
        return self.flag(layer)

    def _decide(self, layer: int, hidden: Tensor | None) -> None:
        self.gate.decide(layer, hidden, self.state)
        self.needs[layer].copy_(((self.state.scale != 0) & self.real).any())

    def scale(self, layer: int) -> Tensor | None:
        return self.state.scale if self.gate.blends else None


class LearnedProgram(Program):
    """A router per layer: norm and router are one launch, and the MLP may begin when its input is there."""

    def __init__(self, gate: LearnedGate, rows: int, device: torch.device):
        super().__init__(gate.num_layers, rows, device)
        self.gate = gate.to(device)
        self.limit = gate.limit.reshape(1).float()
        self.source = [
            index if index in gate.routers and not gate.guards.protects(index, gate.num_layers) else -1
            for index in range(gate.num_layers)
        ]
        self.weights = {
            index: RouterWeights.pack(gate.routers[index], device)
            for index in range(gate.num_layers)
            if self.source[index] >= 0
        }
        # Flags and, behind them, how many parts of each layer's normed rows are there: one fill begins a step.
        self.marks = torch.ones(2 * gate.num_layers, dtype=torch.int32, device=device)
        self.needs = self.marks[: gate.num_layers]
        # The MLP writes while its router still runs: what routers write must not be memory that the MLP's output is given.
        self.decided = (
            torch.empty(rows, dtype=torch.float32, device=device), torch.empty(rows, dtype=torch.bool, device=device)
        )  # fmt: skip
        self.scratch: Tensor | None = None

    def begin(self, position: Tensor, real: Tensor) -> None:
        guards = self.gate.guards
        self.real = real
        self.may_skip = (real & (position >= guards.sinks)) if guards.decode else torch.zeros_like(real)
        self.marks.fill_(PENDING)

    def before_mlp(self, layer: int, hidden: Tensor, norm: Norm, ops: Ops) -> Entry:
        need = self.flag(layer)
        if need is None:
            return Entry(hidden, norm)
        if not hidden.is_cuda:
            x = ops.norm(hidden, norm)
            return Entry(x, need=self.decide_on(layer, x))
        if self.scratch is None:
            self.scratch = decode.norm_route_scratch(self.rows, hidden.shape[1], self.device)
        ready = self.marks[self.num_layers + layer : self.num_layers + layer + 1]
        x, _, _ = decode.norm_route(
            hidden, norm.weight, norm.eps, self.weights[layer], self.scratch, threshold=self.limit, plus_one=norm.plus_one,
            may_skip=self.may_skip, real=self.real, needs=need, decided=self.decided, ready=ready,
        )  # fmt: skip
        return Entry(x, need=need, ready=(ready, PENDING + decode.norm_route_parts(*hidden.shape)))

    def decide_on(self, layer: int, x: Tensor) -> Tensor | None:
        need = self.flag(layer)
        if need is not None:
            router = self.gate.routers[layer]
            reference.router_score(x, router, threshold=self.limit, may_skip=self.may_skip, real=self.real, needs=need)
        return need


class CascadeProgram(Program):
    """Probes at a few checkpoints; a flag holds from one to the next."""

    def __init__(self, gate: CascadeGate, rows: int, device: torch.device):
        super().__init__(gate.num_layers, rows, device)
        self.gate = gate.to(device)
        passed = [max((c for c in gate.checkpoints if c <= index), default=-1) for index in range(gate.num_layers)]
        self.source = [-1 if gate.guards.protects(index, gate.num_layers) else c for index, c in enumerate(passed)]
        self.limits = gate.limits.float().to(device)
        self.weights = (
            {index: ProbeWeights.pack(gate.probes[index], device) for index in gate.checkpoints}
            if device.type == "cuda"
            else {}
        )
        self.latched = torch.zeros(rows, dtype=torch.bool, device=device)

    def begin(self, position: Tensor, real: Tensor) -> None:
        guards = self.gate.guards
        self.real = real
        self.may_skip = (real & (position >= guards.sinks)) if guards.decode else torch.zeros_like(real)
        self.latched.zero_()

    def enter(self, layer: int, hidden: Tensor) -> None:
        if layer not in self.gate.probes:
            return
        index = self.gate.checkpoints.index(layer)
        probe: Any = self.weights[layer] if self.weights else self.gate.probes[layer]
        score: Any = probe_risk if self.weights else reference.probe_risk
        score(
            hidden, probe, threshold=self.limits[index : index + 1], latched=self.latched, may_skip=self.may_skip,
            real=self.real, needs=self.needs[layer : layer + 1],
        )  # fmt: skip


def make_program(gate: Gate, rows: int, device: torch.device) -> Program:
    """The gate's own rule wherever the program that is known might not be it: for a class derived from these, and for routers and
    probes that are wider than the kernels go."""
    kind = type(gate)
    if gate.trivial:
        return Program(gate.num_layers, rows, device)
    if kind is AlwaysGate or kind is RandomGate:
        return ForcedProgram(gate.num_layers, rows, device, gate)  # type: ignore[arg-type]
    if isinstance(gate, LearnedGate):
        narrow = all(router.inner.shape[0] <= MAX_UNITS for router in gate.routers.values())
        if narrow and kind is LearnedGate:
            return LearnedProgram(gate, rows, device)
    if isinstance(gate, CascadeGate):
        narrow = all(probe.proj.weight.shape[0] <= MAX_RANK for probe in gate.probes.values())
        if narrow and kind in (CascadeGate, FixedGate) and gate.batch_rule == "token" and gate.adaptive is None:
            return CascadeProgram(gate, rows, device)
    return GateProgram(gate, rows, device)
