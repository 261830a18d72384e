"""A session on CUDA: decisions are taken on the device, and a graph that vLLM replays follows them without the host.

While vLLM captures a graph (`captured.py`), a layer's MLP becomes one of

- nodes: an IF-ELSE node. Whatever the MLP launches (quantized kernels, all-reduce) is the one body, the stand-in the other.
  The body's own output is what the next layer reads: nothing is cleared or copied when the MLP runs.
- kernels: for open bf16 weights and few rows, launches that a flag stops. No node; rounding differs from cuBLAS.

A learned gate's router is one launch with the norm ahead of the MLP, where that is one we know (`norms.py`).

In a graph the MLP runs if any row needs it; rows that would have skipped then get it for free. Steps that no graph covers
(long prompts) decide row by row: active rows are packed, and a grouped matrix product reads their number on the device. Where
the host knows what all rows do (a gate that looks at nothing, and no row that is an exception), an MLP is launched or not.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sedac_cli.errors import InputError
from sedac_cli.gates.base import TokenState
from sedac_cli.gpu.route import gather_rows, scatter_rows
from sedac_cli.vllm.captured import Capture, known_flag, relax_captures
from sedac_cli.vllm.dense_mlp import DenseMlp
from sedac_cli.vllm.inputs import MAY_SKIP, MUST_RUN, PADDING, StepInputs
from sedac_cli.vllm.norms import ROUTED_ROWS, MlpNorm
from sedac_cli.vllm.session import Session, StepRows, is_batch_max

log = logging.getLogger("vllm.sedac")

PACK_ROWS = 512
"""From here on packing rows pays in a step without a graph; below, weights are read whole for one active row as for all."""


class DeviceSession(Session):
    kind = "conditional nodes"

    def __init__(self, settings: Any, plan: Any, layers: Any, device: torch.device, max_tokens: int):
        super().__init__(settings, plan, layers, device, max_tokens)
        self.inputs = StepInputs(max_tokens, device)
        self.ran = torch.zeros(len(self.gated) + 1, dtype=torch.long, device=device)
        """Tokens whose MLP ran in steps without a graph, by place; then all tokens of such steps."""
        self.seen = 0
        """Tokens the device had come to when the counters were last read."""
        self.protected = False
        """Whether any row of this step must run every MLP."""
        self.dense = {layer: DenseMlp.of(self.layers[layer].mlp) for layer in self.gated}
        self.packs = False
        self.use_kernels = self.wants_kernels(settings.mlp)
        if self.use_kernels:
            self.kind = "kernels under flags for few rows, conditional nodes"
        self.capture = Capture(self) if self.gated else None

    def wants_kernels(self, asked: str) -> bool:
        why = self.no_kernels()
        if asked == "kernels" and why is not None:
            raise InputError(f"SEDAC_MLP=kernels: {why}", hint="SEDAC_MLP=nodes wraps whatever the MLP launches")
        if asked == "auto" and self.gated:
            why = why or self.not_measured() or self.other_results()
            if why is not None:
                log.info("sedac: all gated MLPs run in conditional nodes: %s", why)
        return asked != "nodes" and why is None

    def no_kernels(self) -> str | None:
        """Why the MLPs cannot be run by our kernels."""
        if self.gate.blends:
            return f"they run an MLP or leave it; gate '{self.gate.name}' may blend it"
        for layer, mlp in self.dense.items():
            if mlp is None:
                why = "has adapters" if layer in self.adapted else "is not one"
                return f"they take MLPs of two open bf16 matrices; the {type(self.layers[layer].mlp).__name__} of layer {layer} {why}"
        return None

    def not_measured(self) -> str | None:
        """Why kernels are not chosen unasked."""
        major, minor = torch.cuda.get_device_capability(self.device)
        return None if major == 9 else f"kernels were not measured on compute capability {major}.{minor}"

    @torch.inference_mode()
    def other_results(self) -> str | None:
        """By how much the kernels miss what vLLM's own MLP gives, on rows made up, if by more than rounding. One answer for all ranks:
        under a closed gate they must wait for each other, or not, together."""
        layer = self.gated[0]
        mlp = self.dense[layer]
        assert mlp is not None
        x = torch.randn(4, mlp.gate_up.shape[1], dtype=mlp.gate_up.dtype, device=self.device)
        need, out = torch.ones(1, dtype=torch.int32, device=self.device), torch.empty_like(x)
        mlp.few(x, out, need)
        off = relative(mlp.reduce(out), self.layers[layer].mlp.forward(x))
        good = mlp.reduce(torch.full((1,), float(off < 2e-2), device=self.device))
        return None if float(good) == mlp.parallel else f"the kernels miss vLLM's own MLP by {off:.2g}"

    def join_norms(self) -> None:
        if self.capture is None or self.capture.mode != "routers":
            return
        for layer in self.gated:
            norm = MlpNorm.of(self.layers[layer])
            if norm is not None and norm.agrees():
                self.norms[layer] = norm
        if len(self.norms) < len(self.gated):
            log.info(
                "sedac: %d of %d routers are launches of their own: the norms ahead of those MLPs are not known",
                len(self.gated) - len(self.norms), len(self.gated),
            )  # fmt: skip

    def install(self) -> None:
        if self.gated:
            relax_captures()
        super().install()
        self.packs = bool(self.gated) and self.packing_works()

    @torch.inference_mode()
    def packing_works(self) -> bool:
        """Whether the grouped product gives what vLLM's own MLP gives, on rows made up; said once if not."""
        mlp = self.dense[self.gated[0]]
        if mlp is None or any(other is None for other in self.dense.values()):
            return False
        x = torch.randn(PACK_ROWS, mlp.gate_up.shape[1], dtype=mlp.gate_up.dtype, device=self.device)
        expected = self.forward[self.gated[0]](x)
        try:
            got = mlp.packed(x, torch.full((1,), PACK_ROWS, dtype=torch.int32, device=self.device))
        except RuntimeError as error:
            log.warning("sedac: rows are not packed in steps without a graph: %s", str(error).splitlines()[0])
            return False
        off = relative(got, expected)
        if not off < 2e-2:
            log.warning("sedac: rows are not packed in steps without a graph: the grouped product is off by %.2g", off)
        return off < 2e-2

    # One step ---------------------------------------------------------------------------------------------------

    def begin(self, rows: StepRows | None) -> None:
        super().begin(rows)
        if rows is None or self.capture is None:
            return
        force, strict = self.masks(rows)
        if rows.strict is not None and self.capture.mode in ("probes", "routers"):
            force = force | ~np.isnan(
                rows.strict
            )  # these kernels hold one threshold for all; every MLP is stricter still
        state = np.where(force | (rows.position < self.gate.guards.sinks), MUST_RUN, MAY_SKIP).astype(np.int32)
        if is_batch_max(self.gate):
            state[rows.prefill] = PADDING
        sinks = self.gate.guards.sinks
        self.protected = bool(force.any()) or bool(sinks and (rows.position < sinks).any())
        if strict is None and self.gate.strict_side is not None:
            strict = np.full(len(force), np.inf if self.gate.strict_side == "low" else -np.inf, dtype=np.float32)
        self.inputs.write(rows.position, state, strict, self.protected)

    def start(self, count: int) -> TokenState:
        """From device memory, so that a captured pass reads the rows of the step that replays it."""
        state = self.inputs.state(count)
        assert self.capture is not None
        strict = None
        if self.capture.mode == "torch" and self.gate.strict_side is not None:
            strict = self.inputs.strict(count)
        return self.gate.start(
            count, self.device, shape=(count, 1) if is_batch_max(self.gate) else (1, count),
            position=self.inputs.position(count) if self.gate.guards.sinks else None, real=state > PADDING,
            prefill=self.gate.guards.prefill, force=state == MUST_RUN, strict=strict,
        )  # fmt: skip

    def masks_alone(self, count: int) -> TokenState:
        """As `start`, for launches that read two masks: the host has said of each row what the guards say of it. Each launch that
        a captured step begins with is 2 us of every step."""
        state = self.inputs.state(count)
        made = TokenState(
            shape=(1, count), scale=torch.empty(count, dtype=torch.float32, device=self.device),
            exit_layer=torch.empty(count, dtype=torch.int32, device=self.device), may_skip=state == MAY_SKIP,
            real=state > PADDING,
        )  # fmt: skip
        self.gate.prepare(made)
        return made

    def look(self, layer: int, hidden: Tensor, residual: Tensor | None) -> None:
        assert self.capture is not None
        capturing = torch.cuda.is_current_stream_capturing()
        if not capturing and self.rows is None:
            self.capture.warm_look(layer, hidden)
            return
        stream = hidden if residual is None else hidden + residual
        state = self.fresh(stream.shape[0], capturing)
        if capturing:
            self.capture.look(layer, stream, state)
        else:
            self.gate.decide(layer, stream, state)

    def fresh(self, count: int, capturing: bool = False) -> TokenState:
        if self.state is None:
            launched = capturing and self.capture is not None and self.capture.mode in ("probes", "routers")
            self.state = self.masks_alone(count) if launched else self.start(count)
            if capturing and self.capture is not None:
                self.capture.open(count)
        return self.state

    def norm(self, layer: int, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Of few rows in a graph together with the router. vLLM's own would here be one launch for each of its operations in torch:
        it is written to be compiled, and the compiler does not see into an operator."""
        norm, count = self.norms[layer], hidden.shape[0]
        if not norm.takes(hidden, residual):
            return super().norm(layer, hidden, residual)
        assert self.capture is not None
        capturing = torch.cuda.is_current_stream_capturing()
        if capturing and count <= ROUTED_ROWS:
            return self.capture.norm(layer, norm, hidden, residual, self.fresh(count, True))
        if not capturing and self.rows is None:
            self.capture.warm_norm(layer, norm, hidden, residual)
        return norm.add(hidden, residual)

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        assert self.capture is not None
        capturing = torch.cuda.is_current_stream_capturing()
        if capturing:
            return self.captured(layer, x, self.capture)
        if self.rows is None:
            self.capture.warm_mlp(layer, x)
            if self.packs and x.shape[0] >= PACK_ROWS:  # vLLM measures here how much memory a step takes
                return self.by_rows(layer, x, torch.ones(x.shape[0], dtype=torch.float32, device=x.device))
            return self.forward[layer](x)
        place, count = self.capture.place[layer], len(self.rows.position)
        if layer == self.gated[-1]:
            self.ran[-1] += count
        if self.capture.mode == "static" and not self.protected:
            if known_flag(self.gate, layer):
                self.ran[place] += count
                return self.forward[layer](x)
            instead = self.standin.rows(layer, x)
            return torch.zeros_like(x) if instead is None else instead.to(x.dtype)
        state = self.fresh(x.shape[0], capturing)
        if layer not in self.looks:
            self.gate.decide(layer, x if self.gate.looks_at == "mlp" else None, state)
        self.ran[place] += (state.scale[:count] > 0).sum()
        if layer == self.gated[-1]:
            self.state = None
        return self.by_rows(layer, x, state.scale)

    def captured(self, layer: int, x: Tensor, capture: Capture) -> Tensor:
        state = None
        if capture.mode != "static":
            state = self.fresh(x.shape[0], True)
        elif layer == self.gated[0]:
            capture.open(x.shape[0])
        out = capture.mlp(layer, x, state)
        if layer == self.gated[-1]:
            capture.close()
            self.state = None
        return out

    def by_rows(self, layer: int, x: Tensor, scale: Tensor) -> Tensor:
        """Outside graphs: each row for itself, no host sync. Where rows are not packed all are computed, and nothing is saved."""
        mlp, soft = self.dense[layer], self.gate.blends
        packs = self.packs and mlp is not None and x.shape[0] >= PACK_ROWS
        if packs and mlp is not None:
            packed = gather_rows(x, scale)
            out = scatter_rows(mlp.packed(packed.rows, packed.counts[:1]), packed.slot)  # zero in the other rows
        else:
            out = self.forward[layer](x)
        instead = self.standin.rows(layer, x)
        if packs and instead is None and not soft:
            return out
        weight = scale.unsqueeze(-1).to(out.dtype)
        other = torch.zeros_like(out[:1]) if instead is None else instead.to(out.dtype)
        mixed = torch.where(weight == 0, other, out)
        if not soft:
            return mixed
        return torch.where((weight == 0) | (weight == 1), mixed, weight * out + (1 - weight) * other)

    # From outside -----------------------------------------------------------------------------------------------

    def add_up(self) -> None:
        """Bring the counters up to date: on the device only what ran is counted."""
        if self.capture is None:
            return
        graphs, rows, before = self.capture.ran.tolist(), self.ran.tolist(), 0
        self.seen = graphs[-1] + rows[-1]
        latches = self.capture.mode in ("probes", "static")
        for place, layer in enumerate(self.gated):
            skipped = max(0, self.seen - rows[place] - graphs[self.capture.point(layer)])
            self.counters.skipped[layer] = skipped
            self.counters.exits[layer] = max(0, skipped - before) if latches else skipped
            before = skipped

    def settled(self) -> bool:
        return self.capture is None or self.seen == self.counters.tokens

    def status(self) -> dict[str, Any]:
        torch.cuda.synchronize(self.device)
        self.add_up()
        mode = None if self.capture is None else self.capture.mode
        return super().status() | {"mode": mode, "packs": self.packs}

    def reset(self) -> None:
        super().reset()
        self.ran.zero_()
        if self.capture is not None:
            self.capture.ran.zero_()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).float().norm() / expected.float().norm().clamp_min(1e-9))
