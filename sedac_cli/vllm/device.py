"""A session on CUDA: decisions are taken on the device, and a graph that vLLM replays follows them without the host.

While vLLM captures a graph, the ops run once and leave behind what each replay does. A layer's MLP becomes one of

- nodes: an IF-ELSE node. Whatever the MLP launches (quantized kernels, all-reduce) is the one body, the stand-in the other.
  The body's own output is what the next layer reads: nothing is cleared or copied when the MLP runs.
- kernels: for open bf16 weights and up to 64 rows, launches that a flag stops. No node; rounding differs from cuBLAS.

In a graph the MLP runs if any row needs it; rows that would have skipped then get it for free. Steps that no graph covers
(long prompts) decide row by row: active rows are packed, and a grouped matrix product reads their number on the device.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sedac_cli.errors import InputError
from sedac_cli.gates.base import TokenState
from sedac_cli.gates.cascade import CascadeGate
from sedac_cli.gates.learned import LearnedGate
from sedac_cli.gates.simple import AlwaysGate, RandomGate
from sedac_cli.gates.soft import SoftGate
from sedac_cli.gpu.conditional import ConditionalGraph, Conditions
from sedac_cli.gpu.probe import MAX_RANK, ProbeWeights, RouterWeights, probe_risk, router_score
from sedac_cli.gpu.route import gather_rows, scatter_rows
from sedac_cli.gpu.skinny import MAX_SKINNY_ROWS
from sedac_cli.vllm.dense_mlp import DenseMlp
from sedac_cli.vllm.forced import ForcedGate
from sedac_cli.vllm.inputs import MAY_SKIP, MUST_RUN, PADDING, StepInputs
from sedac_cli.vllm.session import Session, StepRows, is_batch_max

log = logging.getLogger("vllm.sedac")

PACK_ROWS = 512
"""From here on packing rows pays in a step without a graph; below, weights are read whole for one active row as for all."""


class DeviceSession(Session):
    def __init__(self, settings: Any, plan: Any, layers: Any, device: torch.device, max_tokens: int):
        super().__init__(settings, plan, layers, device, max_tokens)
        self.place = {layer: i for i, layer in enumerate(self.gated)}
        self.inputs = StepInputs(max_tokens, device)
        self.flags = torch.ones(max(1, len(self.gated)), dtype=torch.int32, device=device)
        """Of the pass under way, by place: 1 = the MLP runs. What ends a pass adds it up."""
        self.ran = torch.zeros(max(1, len(self.gated)), dtype=torch.long, device=device)
        self.ran_in_graphs = torch.zeros_like(self.ran)
        self.mode = self._mode()
        self.blends = isinstance(self.gate, SoftGate)
        self.probes: dict[int, ProbeWeights] = {}
        self.routers: dict[int, RouterWeights] = {}
        gate: Any = self.gate
        if self.mode == "probes":
            self.probes = {layer: ProbeWeights.pack(gate.probes[layer], device) for layer in self.looks}
        elif self.mode == "routers":
            self.routers = {layer: RouterWeights.pack(gate.routers[layer], device) for layer in self.gated}
        elif self.mode == "static":
            off = [0] * len(self.gated)
            self.static = torch.tensor(off, dtype=torch.int32, device=device)
            self.index = torch.tensor(self.gated, dtype=torch.long, device=device)
        self.dense = {layer: DenseMlp.of(self.layers[layer].mlp) for layer in self.gated}
        self.use_kernels = settings.mlp == "kernels"
        if self.use_kernels and self.blends:
            raise InputError("SEDAC_MLP=kernels cannot blend as gate 'soft' does", hint="SEDAC_MLP=nodes")
        if self.use_kernels and (missing := [layer for layer in self.gated if self.dense[layer] is None]):
            raise InputError(
                f"SEDAC_MLP=kernels needs bf16 MLPs of two open matrices; layer {missing[0]} is "
                f"{type(self.layers[missing[0]].mlp).__name__}",
                hint="SEDAC_MLP=nodes wraps whatever the MLP launches",
            )
        self.kind = "flagged kernels up to 64 rows, conditional nodes" if self.use_kernels else "conditional nodes"
        self.nodes: ConditionalGraph
        self.conditions: Conditions | None = None
        self.side = torch.cuda.Stream(device)
        self.beside: list[Any] = []
        """What work on the side stream still reads: kept until the streams join, so that its memory is not given away."""
        self.warmed: set[tuple[int, int]] = set()
        self.packs = False

    def _mode(self) -> str:
        gate = self.gate
        if isinstance(gate, (ForcedGate, AlwaysGate)):
            return "static"
        if isinstance(gate, CascadeGate) and not is_batch_max(gate):
            return "probes" if all(probe.rank <= MAX_RANK for probe in gate.probes.values()) else "torch"
        if isinstance(gate, LearnedGate):
            return "routers"
        if isinstance(gate, RandomGate):
            raise InputError(
                "gate 'random' draws its coins anew in every pass, which a CUDA graph cannot", hint="--device cpu"
            )
        return "torch"

    def install(self) -> None:
        if not self.gated:
            return super().install()
        self.make_nodes()
        relax_captures()
        super().install()
        self.packs = self._packing_works()

    def make_nodes(self) -> None:
        try:
            self.nodes = ConditionalGraph(self.device)
        except RuntimeError as error:
            raise InputError(f"sedac on CUDA: {error}") from None

    @torch.inference_mode()
    def _packing_works(self) -> bool:
        """Whether the grouped product gives what vLLM's own MLP gives, on rows made up; said once if not."""
        if any(mlp is None for mlp in self.dense.values()):
            return False
        layer = self.gated[0]
        mlp = self.dense[layer]
        assert mlp is not None
        x = torch.randn(PACK_ROWS, mlp.gate_up.shape[1], dtype=mlp.gate_up.dtype, device=self.device)
        expected = self.forward[layer](x)
        try:
            got = mlp.packed(x, torch.full((1,), PACK_ROWS, dtype=torch.int32, device=self.device))
        except RuntimeError as error:
            log.warning("sedac: rows are not packed in steps without a graph: %s", str(error).splitlines()[0])
            return False
        error = float((got - expected).float().norm() / expected.float().norm().clamp_min(1e-9))
        if not error < 2e-2:
            log.warning(
                "sedac: rows are not packed in steps without a graph: the grouped product is off by %.2g", error
            )
        return error < 2e-2

    # One step ---------------------------------------------------------------------------------------------------

    def begin(self, rows: StepRows | None) -> None:
        super().begin(rows)
        if rows is None or not self.gated:
            return
        force, strict = self.masks(rows)
        if rows.strict is not None and self.mode in ("probes", "routers"):
            force = force | ~np.isnan(
                rows.strict
            )  # the kernels hold one threshold for all: stricter still, every MLP runs
        state = np.where(force, MUST_RUN, MAY_SKIP).astype(np.int32)
        if is_batch_max(self.gate):
            state[rows.prefill] = PADDING
        sinks = self.gate.guards.sinks
        protected = bool(force.any()) or bool(sinks and (rows.position < sinks).any())
        if strict is None and self.gate.strict_side is not None:
            strict = np.full(len(force), np.inf if self.gate.strict_side == "low" else -np.inf, dtype=np.float32)
        self.inputs.write(rows.position, state, strict, protected)

    def start(self, count: int) -> TokenState:
        state = self.inputs.state(count)
        strict = self.inputs.strict(count) if self.mode == "torch" and self.gate.strict_side is not None else None
        shape = (count, 1) if is_batch_max(self.gate) else (1, count)
        return self.gate.start(
            count, self.device, shape=shape, position=self.inputs.position(count) if self.gate.guards.sinks else None,
            real=state > PADDING, prefill=self.gate.guards.prefill, force=state == MUST_RUN, strict=strict,
        )  # fmt: skip

    def look(self, layer: int, hidden: Tensor, residual: Tensor | None) -> None:
        capturing = torch.cuda.is_current_stream_capturing()
        if not capturing and self.rows is None:
            self.warm_look(layer, hidden)
            return
        stream = hidden if residual is None else hidden + residual
        state = self.fresh(stream.shape[0], layer)
        if not capturing:
            self.gate.decide(layer, stream, state)
            return
        if self.mode != "probes":
            self.gate.decide(layer, stream, state)
            return
        first = next(i for i, gated in enumerate(self.gated) if gated >= layer)
        self.judge(layer, stream, state, self.flags[first : first + 1], self.tail(first))

    def judge(self, layer: int, stream: Tensor, state: TokenState, flag: Tensor, arm: Any) -> None:
        """A probe as one launch: risk, latch, "does any token still need its MLPs?", and the nodes that follow from it."""
        gate: Any = self.gate
        index = gate.checkpoints.index(layer)
        latched = state.memory["latched"]
        before = None if gate.adaptive is None else latched.clone()
        limit = gate.limits[index : index + 1]
        risk = probe_risk(
            stream, self.probes[layer], threshold=limit, latched=latched, may_skip=state.may_skip, real=state.real,
            needs=flag, arm=arm,
        )  # fmt: skip
        if before is not None:
            self.learn(index, risk, state.may_skip, before)

    def learn(self, index: int, risk: Tensor, may_skip: Tensor, before: Tensor) -> None:
        """Teach the thresholds: thirty small launches that nothing in this pass waits for."""
        gate: Any = self.gate
        if not self.full():
            gate.adaptive.observe(index, risk, may_skip & ~before)
            return
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            reached = may_skip & ~before
            gate.adaptive.observe(index, risk, reached)
        self.beside += [risk, before, reached]

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            return self.captured(layer, x)
        if self.rows is None:
            self.warm_mlp(layer, x)
            if self.packs and x.shape[0] >= PACK_ROWS:  # vLLM measures here how much memory a step takes
                return self.by_rows(layer, x, torch.ones(x.shape[0], device=x.device))
            return self.forward[layer](x)
        state = self.fresh(x.shape[0], layer)
        if layer not in self.looks:
            self.gate.decide(layer, x if self.gate.looks_at == "mlp" else None, state)
        self.ran[self.place[layer]] += ((state.scale > 0) & state.real).sum()
        if layer == self.gated[-1]:
            self.state = None
        return self.by_rows(layer, x, state.scale)

    def by_rows(self, layer: int, x: Tensor, scale: Tensor) -> Tensor:
        """Outside graphs: each row for itself, no host sync. Without packing the MLP runs on all rows, and its work is not saved."""
        mlp = self.dense[layer]
        if self.packs and mlp is not None and x.shape[0] >= PACK_ROWS:
            packed = gather_rows(x, scale)
            out = scatter_rows(mlp.packed(packed.rows, packed.counts[:1]), packed.slot)
        else:
            out = self.forward[layer](x)
        weight = scale.unsqueeze(-1).to(out.dtype)
        instead = self.standin.rows(layer, x)
        other = torch.zeros_like(out) if instead is None else instead.to(out.dtype)
        if self.blends:
            return torch.where(weight == 1, out, torch.where(weight == 0, other, weight * out + (1 - weight) * other))
        return torch.where(weight > 0, out, other)

    # Captured ---------------------------------------------------------------------------------------------------

    def full(self) -> bool:
        """Whether the graph being captured is the whole step, and not a piece between two attentions."""
        from vllm.config import CUDAGraphMode
        from vllm.forward_context import get_forward_context, is_forward_context_available

        return (
            not is_forward_context_available()
            or get_forward_context().cudagraph_runtime_mode != CUDAGraphMode.PIECEWISE
        )

    def fresh(self, count: int, layer: int) -> TokenState:
        """In static mode there is no state: the flags are all."""
        if self.state is None:
            self.state = self.start(count)
            if torch.cuda.is_current_stream_capturing():
                self.open(count)
        return self.state

    def flagged(self, count: int) -> bool:
        """Whether a pass of so many rows runs under flags rather than in nodes."""
        return self.use_kernels and count <= MAX_SKINNY_ROWS

    def open(self, count: int) -> None:
        """The first site of a captured pass: in a full graph all conditions are made now, so that one launch can arm many."""
        self.conditions = None
        if not self.flagged(count) and self.nodes.native_else and self.full():
            self.conditions = self.nodes.conditions(len(self.gated), either=True)

    def tail(self, first: int) -> Conditions | None:
        """The conditions from a place on, for one launch to arm; None where each layer arms its own."""
        made = self.conditions
        return None if made is None else Conditions(made.owner, made.handles[first:], True, made.table[first:])

    def single(self, place: int, count: int) -> tuple[Conditions | None, int]:
        """(conditions, index) of one layer's node, if it has one."""
        if self.flagged(count):
            return None, 0
        if self.conditions is not None:
            return self.conditions, place
        return self.nodes.conditions(1, either=True), 0

    def captured(self, layer: int, x: Tensor) -> Tensor:
        place = self.place[layer]
        state = None
        if self.mode == "static":
            if place == 0:
                self.open(x.shape[0])
                torch.maximum(self.static_flags(), self.inputs.protected, out=self.flags)
                if self.conditions is not None:
                    self.conditions.set(self.flags)
        else:
            state = self.fresh(x.shape[0], layer)
        flag = self.flags[self.point(layer) : self.point(layer) + 1]
        conditions, index = self.single(place, x.shape[0])
        armed = self.conditions is not None and self.mode in ("static", "probes")
        if self.mode == "routers":
            gate: Any = self.gate
            assert state is not None
            own = None if conditions is None else Conditions(conditions.owner, *_one(conditions, index))
            router_score(
                x, self.routers[layer], threshold=gate.limit.view(1), may_skip=state.may_skip, real=state.real, needs=flag,
                arm=own,
            )  # fmt: skip
            armed = True
        elif self.mode == "torch":
            assert state is not None
            if layer not in self.looks:
                self.gate.decide(layer, x if self.gate.looks_at == "mlp" else None, state)
            flag.copy_(((state.scale > 0) & state.real).any())
        if conditions is not None and not armed:
            Conditions(conditions.owner, *_one(conditions, index)).set(flag)
        if conditions is None:
            out = self.run_kernels(layer, x, flag)
        else:
            out = self.run_nodes(layer, x, conditions, index, state)
        if place == len(self.gated) - 1:
            self.close()
        return out

    def static_flags(self) -> Tensor:
        gate = self.gate
        if isinstance(gate, ForcedGate):
            return gate.flags if len(self.gated) == gate.num_layers else gate.flags.index_select(0, self.index)
        return self.static

    def point(self, layer: int) -> int:
        """The place of the flag that speaks for a layer: its own, or that of the checkpoint it follows."""
        if self.mode != "probes":
            return self.place[layer]
        last = max(look for look in self.looks if look <= layer)
        return next(i for i, gated in enumerate(self.gated) if gated >= last)

    def run_nodes(self, layer: int, x: Tensor, conditions: Conditions, index: int, state: TokenState | None) -> Tensor:
        run, otherwise = conditions.branches(index)
        with run:
            out = self.blended(layer, x, self.forward[layer](x), state)
        if out.shape != x.shape or out.dtype != x.dtype or not out.is_contiguous():
            raise InputError(
                f"the MLP of layer {layer} returns {tuple(out.shape)} {out.dtype} for {tuple(x.shape)} {x.dtype}"
            )
        with otherwise:
            instead = self.standin.rows(layer, x)
            if instead is None:
                out.zero_()
            else:
                out.copy_(instead)
        return out

    def run_kernels(self, layer: int, x: Tensor, flag: Tensor) -> Tensor:
        mlp = self.dense[layer]
        assert mlp is not None
        instead = self.standin.rows(layer, x) if mlp.rank == 0 else None  # what all ranks hold is summed
        out = torch.zeros_like(x) if instead is None else instead.to(x.dtype)
        mlp.few(x, out, flag)
        return mlp.reduce(out)

    def blended(self, layer: int, x: Tensor, out: Tensor, state: TokenState | None) -> Tensor:
        """The soft gate's mixture; rows that would have skipped keep the MLP they got."""
        if not self.blends or state is None:
            return out
        weight = state.scale.unsqueeze(-1).to(out.dtype)
        instead = self.standin.rows(layer, x)
        mixed = weight * out if instead is None else weight * out + (1 - weight) * instead.to(out.dtype)
        return torch.where((weight == 0) | (weight == 1), out, mixed)

    def close(self) -> None:
        """The last site of a captured pass."""
        if self.beside:
            torch.cuda.current_stream().wait_stream(self.side)
            self.beside.clear()
        self.ran_in_graphs += self.flags * self.inputs.count
        self.state = None
        self.conditions = None

    # Before capture ---------------------------------------------------------------------------------------------

    def warm_look(self, layer: int, hidden: Tensor) -> None:
        """Everything that a capture of this many rows will launch, once, so that it is compiled and set up."""
        if (layer, hidden.shape[0]) in self.warmed or hidden.shape[0] > PACK_ROWS:
            return
        self.warmed.add((layer, hidden.shape[0]))
        state = self.start(hidden.shape[0])
        if self.mode == "probes":
            spare = torch.zeros(1, dtype=torch.int32, device=self.device)
            for form in (self.nodes.none, None):
                probe_risk(
                    hidden, self.probes[layer], threshold=spare.float(), latched=state.memory["latched"],
                    may_skip=state.may_skip, real=state.real, needs=spare, arm=form,
                )  # fmt: skip
        else:
            with self.unchanged():
                self.gate.decide(layer, hidden, state)

    def warm_mlp(self, layer: int, x: Tensor) -> None:
        if (-1 - layer, x.shape[0]) in self.warmed or x.shape[0] > PACK_ROWS:
            return
        self.warmed.add((-1 - layer, x.shape[0]))
        self.nodes.warm(lambda: (self.forward[layer](x), self.standin.rows(layer, x)))
        spare = torch.ones(1, dtype=torch.int32, device=self.device)
        mlp = self.dense[layer]
        if self.flagged(x.shape[0]) and mlp is not None:
            mlp.few(x, torch.empty_like(x), spare)
        if self.mode == "routers":
            state = self.start(x.shape[0])
            for form in (self.nodes.none, None):
                router_score(
                    x, self.routers[layer], threshold=spare.float(), may_skip=state.may_skip, real=state.real, needs=spare,
                    arm=form,
                )  # fmt: skip
        elif self.mode == "torch" and layer not in self.looks:
            with self.unchanged():
                self.gate.decide(layer, x if self.gate.looks_at == "mlp" else None, self.start(x.shape[0]))

    def unchanged(self) -> Any:
        """What a gate learns from a warm-up would be wrong."""
        adaptive = getattr(self.gate, "adaptive", None)
        return contextlib.nullcontext() if adaptive is None else adaptive.paused()

    # From outside -----------------------------------------------------------------------------------------------

    def count(self) -> None:
        """Bring the counters up to date: on the device only what ran is added up."""
        graphs = self.ran_in_graphs.tolist()
        ran = self.ran.tolist()
        before = 0
        for place, layer in enumerate(self.gated):
            skipped = max(0, self.counters.tokens - ran[place] - graphs[self.point(layer)])
            self.counters.skipped[layer] = skipped
            latch = self.mode in ("probes", "static")
            self.counters.exits[layer] = max(0, skipped - before) if latch else skipped
            before = skipped

    def status(self) -> dict[str, Any]:
        torch.cuda.synchronize(self.device)
        self.count()
        return super().status() | {"mode": self.mode, "packs": self.packs}

    def reset(self) -> None:
        super().reset()
        self.ran.zero_()
        self.ran_in_graphs.zero_()


def _one(conditions: Conditions, index: int) -> tuple[list[int], bool, Tensor]:
    """Handles, kind and table of a single condition among many."""
    if conditions.has_opposite:
        assert conditions.count == 1
        return conditions.handles, True, conditions.table
    return [conditions.handles[index]], True, conditions.table[index : index + 1]


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
