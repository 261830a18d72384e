"""What a pass leaves behind in a CUDA graph that vLLM captures: decisions on the device, and each MLP where they reach it.

While vLLM captures, the ops of the model run once; what they launch here is what every replay does. A graph is a whole step or,
between two attentions, a piece of one: in a whole step one launch arms the nodes of many layers, in a piece each arms its own.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sedac_cli.errors import InputError
from sedac_cli.gates.base import TokenState
from sedac_cli.gates.cascade import CascadeGate
from sedac_cli.gates.learned import LearnedGate
from sedac_cli.gates.simple import AlwaysGate, RandomGate
from sedac_cli.gpu.conditional import ConditionalGraph, Conditions
from sedac_cli.gpu.probe import MAX_RANK, ProbeWeights, RouterWeights, probe_risk, router_score
from sedac_cli.vllm.few_rows import FewRows
from sedac_cli.vllm.forced import ForcedGate
from sedac_cli.vllm.norms import ROUTED_ROWS, MlpNorm
from sedac_cli.vllm.session import is_batch_max

if TYPE_CHECKING:
    from sedac_cli.vllm.device import DeviceSession

WARM_ROWS = 1024
"""Graphs of more rows than this are not captured by vLLM, so nothing need be set up for them."""


@dataclass(frozen=True)
class Decided:
    """A layer whose router was launched with its norm: what its MLP goes on with."""

    own: Conditions | None
    """Its node's, where it becomes one."""
    out: Tensor | None
    """Where it writes, if that could be known."""
    ready: tuple[Tensor, int] | None
    """The counter, and its value, that say that the rows are there."""


class Capture:
    """One per session. `flags[place]` = 1: the MLP runs; `ran[place]`: tokens whose MLP ran, over all replays, and behind them
    all tokens: what was skipped is their difference, however far the device is behind the host."""

    def __init__(self, session: DeviceSession):
        self.session, self.gate = session, session.gate
        gate: Any = self.gate
        device, gated = session.device, session.gated
        self.place = {layer: i for i, layer in enumerate(gated)}
        self.mode = mode_of(gate)
        self.blends = self.gate.blends
        # What one fill sets when a step begins (counters of rows that are there, and flags), then a flag that is always 1.
        marks = torch.ones(2 * len(gated) + 1, dtype=torch.int32, device=device)
        self.all_flags = marks[len(gated) :]
        self.flags = self.all_flags[:-1]
        self.ran = torch.zeros(len(gated) + 1, dtype=torch.long, device=device)
        self.routers: dict[int, RouterWeights] = {}
        if self.mode == "probes":
            self.probes = {layer: ProbeWeights.pack(gate.probes[layer], device) for layer in session.looks}
        elif self.mode == "routers":
            self.routers = {layer: RouterWeights.pack(gate.routers[layer], device) for layer in gated}
        elif self.mode == "static":
            self.index = torch.tensor(gated, dtype=torch.long, device=device)
            self.off = torch.zeros(len(gated), dtype=torch.int32, device=device)
        self.few = FewRows(session, self.mode, marks[:-1], self.routers)
        self.decided: dict[int, Decided] = {}
        try:
            self.nodes = ConditionalGraph(device)
        except RuntimeError as error:
            raise InputError(f"sedac on CUDA: {error}") from None
        self.conditions: Conditions | None = None
        self.side = torch.cuda.Stream(device)
        self.beside: list[Any] = []
        """What work on the side stream still reads: kept until the streams join, so that its memory is not given away."""
        self.warmed: set[tuple[str, int, int]] = set()

    # Where a pass begins and ends -------------------------------------------------------------------------------

    def whole(self) -> bool:
        """Whether the graph being captured is the whole step, and not a piece between two attentions."""
        from vllm.config import CUDAGraphMode
        from vllm.forward_context import get_forward_context, is_forward_context_available

        return (
            not is_forward_context_available()
            or get_forward_context().cudagraph_runtime_mode != CUDAGraphMode.PIECEWISE
        )

    def open(self, count: int) -> None:
        """The first site of a pass. All conditions of a whole step are made now, so that one launch can arm many."""
        self.conditions = None
        self.decided.clear()
        self.few.open(count, self.whole())
        if not self.few.takes(count) and self.nodes.native_else and self.whole():
            self.conditions = self.nodes.conditions(len(self.place), either=True)
        if self.mode == "static":
            wanted = self.off
            if isinstance(self.gate, ForcedGate):
                wanted = self.gate.flags.index_select(0, self.index)
            torch.maximum(wanted, self.session.inputs.protected, out=self.flags)
            if self.conditions is not None:
                self.conditions.set(self.flags)

    def close(self) -> None:
        """The last site of a pass."""
        if self.beside:
            torch.cuda.current_stream().wait_stream(self.side)
            self.beside.clear()
        self.ran += self.all_flags * self.session.inputs.count
        self.conditions = None
        self.few.close()

    # Deciding ---------------------------------------------------------------------------------------------------

    def look(self, layer: int, stream: Tensor, state: TokenState) -> None:
        if self.mode != "probes":
            self.gate.decide(layer, stream, state)
            return
        first = self.governs(layer)
        arm = None if self.conditions is None else _from(self.conditions, first)
        self.judge(layer, stream, state, self.flags[first : first + 1], arm)

    def judge(self, layer: int, stream: Tensor, state: TokenState, flag: Tensor, arm: Conditions | None) -> None:
        """A probe as one launch: risk, latch, "does any token still need its MLPs?", and the nodes that follow from it."""
        gate: Any = self.gate
        index = gate.checkpoints.index(layer)
        latched = state.memory["latched"]
        before = None if gate.adaptive is None else latched.clone()
        risk = probe_risk(
            stream, self.probes[layer], threshold=gate.limits[index : index + 1], latched=latched,
            may_skip=state.may_skip, real=state.real, needs=flag, arm=arm,
        )  # fmt: skip
        if before is not None:
            self.learn(index, risk, state.may_skip, before)

    def learn(self, index: int, risk: Tensor, may_skip: Tensor, before: Tensor) -> None:
        """Teach the thresholds: thirty small launches, beside the pass where it is whole, for nothing in it waits for them."""
        gate: Any = self.gate
        if not self.whole():
            gate.adaptive.observe(index, risk, may_skip & ~before)
            return
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            reached = may_skip & ~before
            gate.adaptive.observe(index, risk, reached)
        self.beside += [risk, before, reached]

    def norm(
        self, layer: int, norm: MlpNorm, hidden: Tensor, residual: Tensor, state: TokenState
    ) -> tuple[Tensor, Tensor]:
        """A router with the norm ahead of it, as one launch. What the MLP needs launched comes before it, for an MLP that races its
        router must come right behind it."""
        gate: Any = self.gate
        place, count = self.place[layer], hidden.shape[0]
        few = self.few.takes(count)
        made = Decided(
            None if few else self.condition(place), self.few.output_ahead(layer, hidden) if few else None,
            self.few.ready(layer, hidden),
        )  # fmt: skip
        self.decided[layer] = made
        return norm.route(
            hidden, residual, self.routers[layer], threshold=gate.limit.view(1), may_skip=state.may_skip, real=state.real,
            needs=self.flags[place : place + 1], arm=made.own, ready=None if made.ready is None else made.ready[0],
            **self.few.norm_memory(count),
        )  # fmt: skip

    def governs(self, look: int) -> int:
        """The place of the first MLP that a checkpoint speaks for."""
        return next(place for layer, place in self.place.items() if layer >= look)

    def point(self, layer: int) -> int:
        """The place of the flag that speaks for a layer: its own, or that of the checkpoint it follows."""
        if self.mode != "probes":
            return self.place[layer]
        return self.governs(max(look for look in self.session.looks if look <= layer))

    # The MLP ----------------------------------------------------------------------------------------------------

    def condition(self, place: int) -> Conditions:
        """Of an MLP that becomes a node."""
        return self.nodes.conditions(1, either=True) if self.conditions is None else _only(self.conditions, place)

    def mlp(self, layer: int, x: Tensor, state: TokenState | None) -> Tensor:
        place, count = self.place[layer], x.shape[0]
        at = self.point(layer)
        flag = self.flags[at : at + 1]
        decided = self.decided.pop(layer, None)
        own: Conditions | None = None
        out: Tensor | None = None
        armed = False
        if self.few.takes(count):
            out = None if decided is None else decided.out
            out = self.few.output(layer, x) if out is None else out
        else:
            armed = self.conditions is not None and self.mode in ("static", "probes")
            own = self.condition(place) if decided is None else decided.own
        if decided is not None:
            armed = True
        elif self.mode == "routers":
            gate: Any = self.gate
            assert state is not None
            router_score(
                x, self.routers[layer], threshold=gate.limit.view(1), may_skip=state.may_skip, real=state.real,
                needs=flag, arm=own, **self.few.router_memory(count),
            )  # fmt: skip
            armed = True
        elif self.mode == "torch":
            assert state is not None
            if layer not in self.session.looks:
                self.gate.decide(layer, x if self.gate.looks_at == "mlp" else None, state)
            # Rows of a prompt beside `max` are marked as padding so that they do not vote; they ask all the same.
            there = torch.arange(count, device=x.device) < self.session.inputs.count
            flag.copy_(((state.scale > 0) & there).any())
        if own is None:
            assert out is not None
            return self.few.run(layer, x, out, flag, None if decided is None else decided.ready)
        if not armed:
            own.set(flag)
        return self.in_node(layer, x, own, state)

    def in_node(self, layer: int, x: Tensor, own: Conditions, state: TokenState | None) -> Tensor:
        """The body's own output is handed on: it lies in the bodies' pool, and in the other branch the stand-in fills it."""
        session = self.session
        run, otherwise = own.branches(0)
        with run:
            out = self.blended(layer, x, session.forward[layer](x), state)
        if out.shape != x.shape or out.dtype != x.dtype or not out.is_contiguous():
            raise InputError(
                f"the MLP of layer {layer} returns {tuple(out.shape)} {out.dtype} for {tuple(x.shape)} {x.dtype}"
            )
        with otherwise:
            instead = session.standin.rows(layer, x)
            if instead is None:
                out.zero_()
            else:
                out.copy_(instead)
        return out

    def blended(self, layer: int, x: Tensor, out: Tensor, state: TokenState | None) -> Tensor:
        """The soft gate's mixture; rows that would have skipped keep the MLP they got."""
        if not self.blends or state is None:
            return out
        weight = state.scale.unsqueeze(-1).to(out.dtype)
        instead = self.session.standin.rows(layer, x)
        mixed = weight * out if instead is None else weight * out + (1 - weight) * instead.to(out.dtype)
        return torch.where((weight == 0) | (weight == 1), out, mixed)

    # Before a capture -------------------------------------------------------------------------------------------

    def warm_look(self, layer: int, hidden: Tensor) -> None:
        """Everything that a capture of this many rows will launch, once, so that it is compiled and set up."""
        if self.done("look", layer, hidden):
            return
        state = self.session.start(hidden.shape[0])
        if self.mode != "probes":
            with self.unchanged():
                self.gate.decide(layer, hidden, state)
            return
        spare = torch.zeros(1, dtype=torch.int32, device=hidden.device)
        for form in (self.nodes.none, None):
            probe_risk(
                hidden, self.probes[layer], threshold=spare.float(), latched=state.memory["latched"],
                may_skip=state.may_skip, real=state.real, needs=spare, arm=form,
            )  # fmt: skip

    def warm_norm(self, layer: int, norm: MlpNorm, hidden: Tensor, residual: Tensor) -> None:
        count = hidden.shape[0]
        if count > ROUTED_ROWS or self.done("norm", layer, hidden):
            return
        spare = torch.ones(1, dtype=torch.int32, device=hidden.device)
        state = self.session.start(count)
        for form in (self.nodes.none, None):
            norm.route(
                hidden, residual, self.routers[layer], threshold=spare.float(), may_skip=state.may_skip, real=state.real,
                needs=spare, arm=form, **self.few.norm_memory(count),
            )  # fmt: skip

    def warm_mlp(self, layer: int, x: Tensor) -> None:
        if self.done("mlp", layer, x):
            return
        session = self.session
        self.nodes.warm(lambda: (session.forward[layer](x), session.standin.rows(layer, x)))
        self.few.warm(layer, x)
        if self.mode == "routers":
            spare = torch.ones(1, dtype=torch.int32, device=x.device)
            state = session.start(x.shape[0])
            for form in (self.nodes.none, None):
                router_score(
                    x, self.routers[layer], threshold=spare.float(), may_skip=state.may_skip, real=state.real,
                    needs=spare, arm=form,
                )  # fmt: skip
        elif self.mode == "torch" and layer not in session.looks:
            with self.unchanged():
                self.gate.decide(layer, x if self.gate.looks_at == "mlp" else None, session.start(x.shape[0]))

    def done(self, what: str, layer: int, rows: Tensor) -> bool:
        key = (what, layer, rows.shape[0])
        if key in self.warmed or rows.shape[0] > WARM_ROWS:
            return True
        self.warmed.add(key)
        return False

    def unchanged(self) -> Any:
        """What a gate learnt from a warm-up would be wrong."""
        adaptive = getattr(self.gate, "adaptive", None)
        return contextlib.nullcontext() if adaptive is None else adaptive.paused()


def mode_of(gate: Any) -> str:
    """How a gate decides in a graph: flags that are known (static), one launch per checkpoint or router, or its own torch code."""
    if isinstance(gate, (ForcedGate, AlwaysGate)):
        return "static"
    if isinstance(gate, RandomGate):
        raise InputError(
            "gate 'random' draws its coins anew in every pass: a CUDA graph would repeat the same ones",
            hint="vLLM on the CPU runs it",
        )
    if isinstance(gate, LearnedGate):
        return "routers"
    if isinstance(gate, CascadeGate) and not is_batch_max(gate):
        return "probes" if all(probe.rank <= MAX_RANK for probe in gate.probes.values()) else "torch"
    return "torch"


def known_flag(gate: Any, layer: int) -> bool:
    """What a static gate says, as the host knows it."""
    return layer < gate.layer if isinstance(gate, AlwaysGate) else gate.on[layer]


def _from(conditions: Conditions, place: int) -> Conditions:
    """The conditions from a place on, for one launch to arm."""
    return Conditions(conditions.owner, conditions.handles[place:], True, conditions.table[place:])


def _only(conditions: Conditions, place: int) -> Conditions:
    return Conditions(
        conditions.owner, conditions.handles[place : place + 1], True, conditions.table[place : place + 1]
    )


def relax_captures() -> None:
    """Bodies allocate while the outer stream is captured: CUDA allows that in the relaxed mode only."""
    original = torch.cuda.graph.__init__
    if hasattr(original, "sedac"):
        return

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if len(args) < 4:
            kwargs["capture_error_mode"] = "relaxed"
        original(self, *args, **kwargs)

    init.sedac = True  # type: ignore[attr-defined]
    torch.cuda.graph.__init__ = init  # type: ignore[method-assign]
