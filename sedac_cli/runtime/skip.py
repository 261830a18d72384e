"""A gate in force inside any Hugging Face model: rows that skip are never computed.

The MLP's `forward` is replaced while the context is open. Active rows are packed, the MLP runs on them alone, and the
result is scattered back; `generate`, caches and batches work unchanged because attention is not touched.

    with skipping(model, "always:14") as run:
        model(**inputs)
    run.skip_ratio        # share of (token, layer) MLPs that were not run
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sedac_cli.gates.base import Gate, TokenState
from sedac_cli.standins import StandIn, ZeroStandIn
from sedac_cli.structure import Branch, Decoder, find_decoder


@dataclass
class Pass:
    """What one forward pass decided. Tensors are [B, T], on the model's device."""

    skipped: Tensor
    exit_layer: Tensor
    real: Tensor
    seconds: float


@dataclass
class SkipRun:
    """An open (or finished) skipping context: counters over all passes, and the passes themselves when asked for."""

    decoder: Decoder
    gate: Gate
    keep_passes: bool = False
    passes: list[Pass] = field(default_factory=list)
    on_pass: Callable[[Pass], None] | None = None
    prefill: bool | None = None

    def __post_init__(self) -> None:
        device = self.decoder.device
        self._skipped = torch.zeros(self.decoder.num_layers, dtype=torch.long, device=device)
        self._tokens = torch.zeros((), dtype=torch.long, device=device)

    @property
    def tokens(self) -> int:
        """Real tokens seen, padding aside."""
        return int(self._tokens)

    @property
    def skipped_per_layer(self) -> list[int]:
        return self._skipped.tolist()

    @property
    def skip_ratio(self) -> float:
        """Skipped (token, layer) MLPs / (tokens x all layers)."""
        return sum(self.skipped_per_layer) / max(1, self.tokens * self.decoder.num_layers)


@contextlib.contextmanager
def skipping(
    model: nn.Module,
    gate: Gate | str,
    standin: StandIn | None = None,
    *,
    decoder: Decoder | None = None,
    keep_passes: bool = False,
    on_pass: Callable[[Pass], None] | None = None,
    prefill: bool | None = None,
) -> Iterator[SkipRun]:
    """Run `model` with `gate` in force (an object, or a spec such as "always:14"); on leaving, it is as it was.

    `prefill` says which phase every pass counts as; left out, a pass of several tokens or without a cache is prefill.
    """
    decoder = decoder or find_decoder(model)
    if isinstance(gate, str):
        from sedac_cli.gates.registry import build_gate

        gate = build_gate(gate, decoder)
    run = SkipRun(decoder, gate, keep_passes, on_pass=on_pass, prefill=prefill)
    installed = _Installed(run, standin or ZeroStandIn())
    installed.install()
    try:
        yield run
    finally:
        installed.remove()


class _Installed:
    """The hooks and wrapped forwards of one open context."""

    def __init__(self, run: SkipRun, standin: StandIn):
        self.run = run
        self.gate = run.gate.to(run.decoder.device)
        self.standin = standin
        self.handles: list[Any] = []
        self.saved: list[tuple[nn.Module, Any]] = []
        self.state: TokenState | None = None
        self.counts: Tensor | None = None
        self.began = 0.0

    def install(self) -> None:
        backbone = self.run.decoder.backbone
        self.handles.append(backbone.register_forward_pre_hook(self.begin, with_kwargs=True))
        self.handles.append(backbone.register_forward_hook(self.end))
        if self.gate.looks_at == "entry":
            for layer in range(self.run.decoder.num_layers):
                self.handles.append(self.run.decoder.at_checkpoint(layer, self.decider(layer)))
        if not self.gate.trivial:
            for branch in self.run.decoder.branches:
                self.wrap(branch)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        for module, forward in reversed(self.saved):
            if forward is None:
                del module.forward
            else:
                module.forward = forward

    # One forward pass -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.began = time.perf_counter()
        ids = kwargs.get("input_ids", args[0] if args else None)
        shape = tuple((ids if ids is not None else kwargs["inputs_embeds"]).shape[:2])
        device = self.run.decoder.device
        past = _past_length(kwargs)
        position, real = _positions(shape, kwargs.get("attention_mask"), past, device)
        prefill = (past == 0 or shape[1] > 1) if self.run.prefill is None else self.run.prefill
        self.state = self.gate.start(
            shape[0] * shape[1], device, shape=shape, position=position, real=real, prefill=prefill
        )
        self.counts = torch.zeros(shape[0] * shape[1], dtype=torch.int32, device=device)

    @torch.no_grad()
    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        state, counts, run = self.state, self.counts, self.run
        assert state is not None
        assert counts is not None
        run._tokens += state.real.sum()
        if run.keep_passes or run.on_pass:
            done = Pass(
                counts.view(state.shape), state.exit_layer.view(state.shape).clone(), state.real.view(state.shape),
                time.perf_counter() - self.began,
            )  # fmt: skip
            if run.keep_passes:
                run.passes.append(done)
            if run.on_pass:
                run.on_pass(done)
        self.state = None

    def decider(self, layer: int) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def see(hidden: Tensor) -> None:
            if self.state is not None:
                rows = hidden.reshape(-1, hidden.shape[-1])
                self.gate.decide(layer, rows.to(self.state.scale.device), self.state)

        return see

    # The MLP ----------------------------------------------------------------------------------------------------

    def wrap(self, branch: Branch) -> None:
        work = _Packed(self, branch.layer)
        if branch.entry is branch.exit:
            self.replace(branch.entry, work.whole(branch.entry.forward))
        else:
            self.replace(branch.entry, work.enter(branch.entry.forward))
            self.replace(branch.exit, work.leave(branch.exit.forward))

    def replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.saved.append((module, module.__dict__.get("forward")))
        module.forward = forward  # type: ignore[method-assign, assignment]

    def active_rows(self, layer: int, flat: Tensor) -> tuple[Tensor, Tensor] | None:
        """(indices of rows to run, scale), or None when every row runs unscaled and the MLP is left alone."""
        state = self.state
        if state is None:
            return None
        if self.gate.looks_at == "mlp":
            self.gate.decide(layer, flat, state)
        skips = state.scale == 0
        self.run._skipped[layer] += skips.sum()
        assert self.counts is not None
        self.counts += skips
        if bool((state.scale == 1).all()):
            return None
        scale = state.scale.to(flat.device)
        return torch.nonzero(scale).squeeze(-1), scale


class _Packed:
    """One layer's MLP on its active rows only."""

    def __init__(self, installed: _Installed, layer: int):
        self.installed = installed
        self.layer = layer
        self.pending: tuple[Tensor, Tensor, Tensor] | None = None

    def whole(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            flat = x.reshape(-1, x.shape[-1])
            plan = self.installed.active_rows(self.layer, flat)
            if plan is None:
                return original(x, *args, **kwargs)
            rows, scale = plan
            if rows.numel() == 0:
                return self.blend(flat, None, rows, scale).view(x.shape)
            result = original(_as_batch(flat[rows], x.dim()), *args, **kwargs)
            if isinstance(result, tuple):
                return (self.blend(flat, result[0], rows, scale).view(x.shape), *result[1:])
            return self.blend(flat, result, rows, scale).view(x.shape)

        return forward

    def enter(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            flat = x.reshape(-1, x.shape[-1])
            plan = self.installed.active_rows(self.layer, flat)
            self.pending = None if plan is None else (x, *plan)
            if plan is None:
                return original(x, *args, **kwargs)
            return original(_as_batch(flat[plan[0]], x.dim()), *args, **kwargs)

        return forward

    def leave(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(packed: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.pending is None:
                return original(packed, *args, **kwargs)
            x, rows, scale = self.pending
            self.pending = None
            result = original(packed, *args, **kwargs) if rows.numel() else None
            return self.blend(x.reshape(-1, x.shape[-1]), result, rows, scale).view(x.shape)

        return forward

    def blend(self, flat: Tensor, result: Tensor | None, rows: Tensor, scale: Tensor) -> Tensor:
        """scale * MLP + (1 - scale) * stand-in; rows of scale 1 take the MLP's output unchanged."""
        if result is not None and rows.numel() == flat.shape[0] and bool((scale == 1).all()):
            return result.reshape(flat.shape)
        instead = self.installed.standin.rows(self.layer, flat)
        out = torch.zeros_like(flat) if instead is None else instead.to(flat.dtype)
        if result is None:
            return out
        ran = result.reshape(-1, flat.shape[-1])
        weight = scale[rows].unsqueeze(-1).to(ran.dtype)
        mixed = torch.where(weight == 1, ran, weight * ran + (1 - weight) * out[rows])
        out[rows] = mixed
        return out


def _as_batch(rows: Tensor, dims: int) -> Tensor:
    """Packed rows in the rank the MLP was called with: [n, H] or [1, n, H]."""
    return rows if dims == 2 else rows.view(*([1] * (dims - 2)), *rows.shape)


def _past_length(kwargs: dict[str, Any]) -> int:
    cache = kwargs.get("past_key_values")
    return int(cache.get_seq_length()) if cache is not None and hasattr(cache, "get_seq_length") else 0


def _positions(shape: tuple[int, ...], mask: Any, past: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Position of each token in its own sequence, and whether it is a token at all: both [B*T]."""
    B, T = shape
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= T:
        seen = mask.to(device).long()
        position = (seen.cumsum(dim=1) - 1).clamp_min(0)[:, past : past + T] if mask.shape[1] > T else None
        if position is None or position.shape[1] != T:
            position = (seen.cumsum(dim=1) - 1).clamp_min(0)[:, -T:]
        real = seen[:, past : past + T] if mask.shape[1] >= past + T else seen[:, -T:]
        return position.reshape(-1), real.bool().reshape(-1)
    position = torch.arange(past, past + T, device=device).expand(B, T)
    return position.reshape(-1), torch.ones(B * T, dtype=torch.bool, device=device)
