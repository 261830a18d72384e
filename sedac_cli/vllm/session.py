"""One gated model in one vLLM worker: what the step's rows are, what the gate decides for them, and what was skipped.

The runner's hook tells a session which rows the coming step has (`begin`); the ops in the model call `look` at the layers whose
entering state the gate reads, and `mlp` in place of each MLP that can be skipped. Layers that can change nothing are left as
vLLM built them. This class is the plain form, for the CPU and for tests: rows that skip are never computed (with adapters,
unless a row of the same step does not skip).
`device.DeviceSession` is the form for CUDA.

    session = Session(settings, plan, layers, torch.device("cpu"), max_tokens=2048)
    session.install()
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sedac_cli.errors import InputError, UsageError
from sedac_cli.gates.base import Gate, TokenState
from sedac_cli.gates.cascade import CascadeGate
from sedac_cli.gates.simple import AlwaysGate
from sedac_cli.runtime.decision import Decision
from sedac_cli.runtime.plan import Plan
from sedac_cli.vllm.forced import ForcedGate
from sedac_cli.vllm.norms import MlpNorm
from sedac_cli.vllm.settings import Settings
from sedac_cli.vllm.surgery import Layer, adapted


@dataclass(frozen=True)
class StepRows:
    """The rows of one step, in the order in which the model sees them; rows beyond these are padding."""

    position: np.ndarray
    """Place of each token in its sequence, from 0."""
    prefill: np.ndarray
    """Whether the token belongs to the prompt, however many rows its request has in this step."""
    dense: np.ndarray | None = None
    """Tokens of requests that opted out."""
    strict: np.ndarray | None = None
    """float32: thresholds of requests; NaN where there is none."""


@dataclass
class Counters:
    """Sums over all steps, on the device the gate decides on."""

    steps: int
    tokens: int
    skipped: Tensor
    """[layers]: tokens whose MLP was not computed."""
    exits: Tensor
    """[layers]: tokens whose first skipped MLP is this one."""
    seconds: float = 0.0
    """Spent deciding; host time, so it means nothing where the device runs behind."""


class Session:
    kind = "packed rows"

    def __init__(self, settings: Settings, plan: Plan, layers: list[Layer], device: torch.device, max_tokens: int):
        self.settings = settings
        self.device = device
        self.max_tokens = max_tokens
        self.gate = plan.gate.to(device)
        self.standin = plan.standin
        self.layers = {layer.index: layer for layer in layers}
        self.looks, self.gated = sites_of(self.gate, sorted(self.layers))
        self.forward: dict[int, Callable[[Tensor], Tensor]] = {}
        self.norms: dict[int, MlpNorm] = {}
        """Norms ahead of gated MLPs that this session runs itself."""
        self.norm_forward: dict[int, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {}
        self.adapted = {layer for layer in self.gated if adapted(self.layers[layer].mlp)}
        self.rows: StepRows | None = None
        self.state: TokenState | None = None
        self.last: Decision | None = None
        self.runner = ""
        count = self.gate.num_layers
        self.counters = Counters(
            0,
            0,
            torch.zeros(count, dtype=torch.long, device=device),
            torch.zeros(count, dtype=torch.long, device=device),
        )

    # The model --------------------------------------------------------------------------------------------------

    def join_norms(self) -> None:
        """Take over the norms that can be one launch with a decision: here no decision is a launch."""

    def install(self) -> None:
        """Put the ops into the model. Instances are changed, never classes: a draft model of the same kind stays as it is."""
        from sedac_cli.vllm import ops

        ops.take(self)
        for index in self.looks:
            _wrap_layer(self.layers[index])
        for index in self.gated:
            self.forward[index] = self.layers[index].mlp.forward
            _wrap_mlp(self.layers[index])
        for index, norm in self.norms.items():
            self.norm_forward[index] = norm.module.forward
            _wrap_norm(index, norm)

    def remove(self) -> None:
        """Give the model back as vLLM built it. Not for a compiled one: the operators are part of what was compiled."""
        from sedac_cli.vllm import ops

        for index in self.looks:
            del self.layers[index].module.forward
        for index in self.gated:
            del self.layers[index].mlp.forward
        for norm in self.norms.values():
            del norm.module.forward
        ops.release(self)

    # One step ---------------------------------------------------------------------------------------------------

    def begin(self, rows: StepRows | None) -> None:
        """The rows of the coming step; None for a run that is no request's (profiling, warm-up): it is dense."""
        self.rows = rows
        self.state = None
        if rows is not None and len(rows.position):
            self.counters.steps += 1
            self.counters.tokens += len(rows.position)

    def end(self) -> None:
        """The step is over, or was launched."""
        self.rows = None
        self.state = None

    def masks(self, rows: StepRows) -> tuple[np.ndarray, np.ndarray | None]:
        """(force, strict) as the gate takes them: one phase is told for the whole pass, its exceptions are forced."""
        guards = self.gate.guards
        force = np.zeros(len(rows.position), dtype=bool) if rows.dense is None else rows.dense.copy()
        if not guards.prefill:
            force |= rows.prefill
        elif not guards.decode:
            force |= ~rows.prefill
        if rows.strict is None or self.gate.strict_side is None:
            return force, None
        lax = math.inf if self.gate.strict_side == "low" else -math.inf
        return force, np.where(np.isnan(rows.strict), lax, rows.strict).astype(np.float32)

    def start(self, count: int) -> TokenState:
        """The gate's fresh state for a pass of `count` rows, padding included."""
        rows = self.rows
        assert rows is not None
        force, strict = self.masks(rows)
        n = len(rows.position)

        def row(values: np.ndarray, fill: float) -> Tensor:
            out = np.full(count, fill, dtype=values.dtype)
            out[:n] = values
            return torch.from_numpy(out).to(self.device)

        real = torch.arange(count, device=self.device) < n
        shape = (1, count)
        if is_batch_max(
            self.gate
        ):  # the rows of one decode step are judged together; a prompt's rows are not among them
            real &= row(~rows.prefill, False)
            shape = (count, 1)
        return self.gate.start(
            count, self.device, shape=shape, position=row(rows.position, 0), real=real, prefill=self.gate.guards.prefill,
            force=row(force, True), strict=None if strict is None else row(strict, 0.0),
        )  # fmt: skip

    def look(self, layer: int, hidden: Tensor, residual: Tensor | None) -> None:
        """The state entering `layer`."""
        if self.rows is None:
            return
        began = time.perf_counter()
        stream = hidden if residual is None else hidden + residual
        self.gate.decide(layer, stream, self.fresh(stream.shape[0]))
        self.counters.seconds += time.perf_counter() - began

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        if self.rows is None:
            return self.forward[layer](x)
        began = time.perf_counter()
        state = self.fresh(x.shape[0])
        if layer not in self.looks:
            self.gate.decide(layer, x if self.gate.looks_at == "mlp" else None, state)
        self.last = found = Decision.of(state, layer, self.last)
        self.counters.skipped[layer] += found.skipped
        if layer == self.gated[-1]:
            self.finish(state)
        self.counters.seconds += time.perf_counter() - began
        if found.everyone:
            return self.forward[layer](x)
        rows = found.rows
        if rows.numel() == 0:
            out = None
        elif layer in self.adapted:
            out = self.forward[layer](x)[rows]
        else:
            out = self.forward[layer](x[rows])
        return found.blend(self.standin, layer, x, out)

    def norm(self, layer: int, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """As vLLM has it, which may work in place: an operator may not give back what it was given."""
        return self.norm_forward[layer](hidden.clone(), residual.clone())

    def fresh(self, count: int) -> TokenState:
        """The state of this pass, new at the first site the pass comes to."""
        if self.state is None:
            self.state = self.start(count)
        return self.state

    def finish(self, state: TokenState) -> None:
        out = state.exit_layer[state.exit_layer < self.gate.num_layers].long()
        self.counters.exits += torch.bincount(out, minlength=self.gate.num_layers)
        self.state = self.last = None

    # From outside -----------------------------------------------------------------------------------------------

    def settled(self) -> bool:
        """Whether the counters, as last read, hold all of the steps that were counted."""
        return self.rows is None

    def status(self) -> dict[str, Any]:
        """What this worker runs, and what it has skipped. Reads the device: for people, not for steps."""
        counters = self.counters
        return {
            "version": self.settings.version,
            "digest": self.settings.digest,
            "pid": os.getpid(),
            "device": str(self.device),
            "how": self.kind,
            "gate": self.gate.name,
            "parameters": self.gate.parameters(),
            "standin": type(self.standin).__name__,
            "layers": sorted(self.layers),
            "looks": self.looks,
            "gated": self.gated,
            "norms": list(self.norms),
            "steps": counters.steps,
            "tokens": counters.tokens,
            "skipped": counters.skipped.tolist(),
            "exits": counters.exits.tolist(),
            "skip_ratio": float(counters.skipped.sum()) / max(1, counters.tokens * len(self.layers)),
            "decision_seconds": counters.seconds,
        }

    def reset(self) -> None:
        self.counters.steps = self.counters.tokens = 0
        self.counters.seconds = 0.0
        self.counters.skipped.zero_()
        self.counters.exits.zero_()

    def set_thresholds(self, values: list[float]) -> None:
        """New thresholds from the next step on; tensors are written in place, so captured graphs follow."""
        if any(not math.isfinite(value) for value in values):
            raise UsageError(f"thresholds {values}: expected finite numbers")
        gate: Any = self.gate
        if hasattr(gate, "limit"):
            if len(values) != 1:
                raise UsageError(f"gate '{gate.name}' has one threshold, not {len(values)}")
            gate.limit.fill_(values[0])
        elif hasattr(gate, "checkpoints"):
            if gate.adaptive is not None:
                raise UsageError(f"gate '{gate.name}' adapts its thresholds by itself", hint="SEDAC_ADAPTIVE=0")
            if len(values) != len(gate.checkpoints):
                raise UsageError(f"{len(values)} thresholds for checkpoints {gate.checkpoints}")
            gate.limits.copy_(torch.tensor(values))
        else:
            raise UsageError(f"gate '{gate.name}' has no thresholds")

    def force(self, off: list[int]) -> None:
        if not isinstance(self.gate, ForcedGate):
            raise UsageError(f"gate '{self.gate.name}' decides by itself", hint="forced:none takes orders")
        self.gate.force(off)


def sites_of(gate: Gate, present: list[int]) -> tuple[list[int], list[int]]:
    """(layers whose entering state is read, layers whose MLP can be skipped) among the layers of this worker."""
    if gate.trivial:
        return [], []
    readable = [layer for layer in range(gate.num_layers) if gate.reads(layer)]
    looks = [layer for layer in readable if gate.looks_at == "entry"]
    if gate.looks_at == "mlp":
        able = readable
    elif isinstance(gate, AlwaysGate):
        able = list(range(gate.layer, gate.num_layers))
    else:
        able = list(range(getattr(gate, "min_layer", min(looks, default=0)), gate.num_layers))
    gated = [layer for layer in able if not gate.guards.protects(layer, gate.num_layers)]
    if not gated:
        return [], []
    return [x for x in looks if x in present and x <= gated[-1]], [x for x in gated if x in present]


def is_batch_max(gate: Gate) -> bool:
    return isinstance(gate, CascadeGate) and gate.batch_rule == "max"


def carries_state(gate: Gate) -> bool:
    """Whether what was decided at one layer matters at a later one: then a pipeline's stages cannot decide alone."""
    return gate.looks_at == "entry" and any(gate.reads(layer) for layer in range(gate.num_layers))


def _wrap_layer(layer: Layer) -> None:
    original, index, stream, residual = layer.module.forward, layer.index, layer.stream, layer.residual
    op = torch.ops.sedac.look

    def take(args: Any, kwargs: Any, place: int, name: str) -> Any:
        return args[place] if place < len(args) else kwargs.get(name)

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = take(args, kwargs, stream, "hidden_states")
        op(hidden, None if residual is None else take(args, kwargs, residual, "residual"), index)
        return original(*args, **kwargs)

    layer.module.forward = forward  # type: ignore[method-assign]


def _wrap_mlp(layer: Layer) -> None:
    index, op = layer.index, torch.ops.sedac.mlp
    if layer.mlp.__dict__.get("forward") is not None:
        raise InputError(f"the MLP of layer {index} is wrapped by somebody else: {layer.mlp.forward}")

    def forward(x: Tensor) -> Tensor:
        return op(x, index)

    layer.mlp.forward = forward  # type: ignore[method-assign]


def _wrap_norm(index: int, norm: MlpNorm) -> None:
    original, op = norm.module.forward, torch.ops.sedac.norm

    def forward(x: Tensor, residual: Tensor | None = None) -> Any:
        return original(x) if residual is None else op(x, residual, index)

    norm.module.forward = forward  # type: ignore[method-assign]
