"""A gate in force inside any Hugging Face model: rows that skip are never computed.

The MLP's `forward` is replaced while the context is open. Active rows are packed, the MLP runs on them alone, and the
result is scattered back; `generate`, caches and batches work unchanged because attention is not touched.

    with skipping(model, "always:14") as run:
        model(**inputs)
    run.skip_ratio        # share of (token, layer) MLPs that were not run
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sedac_cli.errors import InputError, UsageError
from sedac_cli.gates.base import Gate, TokenState
from sedac_cli.runtime.decision import Decision
from sedac_cli.runtime.on_device import OnDevice, may_pack
from sedac_cli.runtime.past import past_in, past_length
from sedac_cli.runtime.positions import positions
from sedac_cli.standins import StandIn, ZeroStandIn
from sedac_cli.structure import RESIDUAL, Branch, Decoder, find_decoder

_OPEN: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Backbones with a gate in force: two gates at once would decide about each other's leftovers."""


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
    force: Tensor | None = None
    """[B, T] of the next passes: tokens that run every MLP whatever the gate says. None: nobody."""
    real: Tensor | None = None
    """[B, T] of the next passes: which rows are tokens, where padding is not masked for the model."""
    prefill: bool | None = None
    paused: bool = False
    """The next passes are the stock model's: nothing is decided, skipped or counted."""

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
    if decoder.backbone in _OPEN:
        raise UsageError(f"a gate is already in force in this {type(model).__name__}", hint="leave its context first")
    if isinstance(gate, str):
        from sedac_cli.runtime.plan import make_plan

        plan = make_plan(gate, decoder)
        gate, standin = plan.gate, standin or plan.standin
    run = SkipRun(decoder, gate, keep_passes, on_pass=on_pass, prefill=prefill)
    installed = _installed(run, standin or ZeroStandIn())
    try:
        installed.install()
        yield run
    finally:
        installed.remove()


def _installed(run: SkipRun, standin: StandIn) -> _Installed:
    if callable(getattr(standin, "leave", None)):  # it stands in for whole layers
        from sedac_cli.runtime.ghost import GhostInstalled

        return GhostInstalled(run, standin, standin)  # type: ignore[arg-type]
    return _Installed(run, standin)


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
        self.last: Decision | None = None
        self.skipped = torch.zeros_like(run._skipped)
        self.began = 0.0
        self.signature = inspect.signature(run.decoder.backbone.forward)

    def install(self) -> None:
        backbone = self.run.decoder.backbone
        _OPEN.add(backbone)
        self.handles.append(backbone.register_forward_pre_hook(self.begin, with_kwargs=True))
        self.handles.append(backbone.register_forward_hook(self.end))
        if self.gate.looks_at == "entry":
            for layer, module in enumerate(self.run.decoder.layers):
                if self.gate.reads(layer):
                    self.handles.append(self.run.decoder.at_checkpoint(layer, self.decider(layer)))
                else:
                    self.handles.append(module.register_forward_pre_hook(self.blind_decider(layer)))
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
        _OPEN.discard(self.run.decoder.backbone)

    # One forward pass -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.state = None  # of a pass that ended in an error
        if self.run.paused:
            return
        self.began = time.perf_counter()
        called = self.signature.bind_partial(*args, **kwargs).arguments
        called |= called.pop("kwargs", {})
        ids = called.get("input_ids")
        shape = tuple((called["inputs_embeds"] if ids is None else ids).shape[:2])
        device = self.run.decoder.device
        mask = called.get("attention_mask")
        past = past_length(past_in(called))
        position, real = positions(shape, mask, called.get("position_ids"), past, device)
        if self.run.real is not None:
            real = real & self.run.real.to(device).reshape(-1)
        force = None if self.run.force is None else self.run.force.to(device).reshape(-1)
        prefill = (past == 0 or shape[1] > 1) if self.run.prefill is None else self.run.prefill
        self.state = self.gate.start(
            shape[0] * shape[1], device, shape=shape, position=position, real=real,
            prefill=prefill, force=force,
        )  # fmt: skip
        self.counts = torch.zeros(shape[0] * shape[1], dtype=torch.int32, device=device)
        self.skipped.zero_()
        self.last = None

    @torch.no_grad()
    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        state, counts, run = self.state, self.counts, self.run
        if state is None:
            return
        assert counts is not None
        run._tokens += state.real.sum()
        run._skipped += self.skipped
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
                flat = hidden.reshape(-1, hidden.shape[-1])
                self.gate.decide(layer, flat.to(self.state.scale.device), self.state)

        return see

    def blind_decider(self, layer: int) -> Callable[[nn.Module, Any], None]:
        """For a layer whose hidden state the rule does not read: there may be no single one (parallel streams)."""

        @torch.no_grad()
        def decide(module: nn.Module, args: Any) -> None:
            if self.state is not None:
                self.gate.decide(layer, None, self.state)

        return decide

    # The MLP ----------------------------------------------------------------------------------------------------

    def wrap(self, branch: Branch) -> None:
        work = _Packed(self, branch)
        if branch.entry is branch.exit:
            self.replace(branch.entry, work.whole(branch.entry.forward))
        else:
            self.replace(branch.entry, work.enter(branch.entry.forward))
            self.replace(branch.exit, work.leave(branch.exit.forward))

    def replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.saved.append((module, module.__dict__.get("forward")))
        module.forward = functools.update_wrapper(forward, module.forward)  # type: ignore[method-assign, assignment]

    def decided(self, layer: int, flat: Tensor) -> Decision | None:
        """Who runs, decided and counted without a wait; None when nothing is to be decided."""
        state = self.state
        if state is None:
            return None
        if flat.shape[0] != state.scale.shape[0]:
            raise InputError(
                f"the MLP of layer {layer} sees {flat.shape[0]} rows where {state.scale.shape[0]} tokens went in: "
                "a model that adds, drops or repeats rows cannot be gated"
            )
        if self.gate.looks_at == "mlp":
            self.gate.decide(layer, flat.to(state.scale.device), state)
        self.last = found = Decision.of(state, layer, self.last)
        self.skipped[layer] += found.skipped
        assert self.counts is not None
        self.counts += found.skips
        return found


_OUTPUTS: dict[type[nn.Module], int] = {}
"""How many values each kind of MLP returns beside its rows (router scores); the layer unpacks that many."""


class _Packed:
    """One layer's MLP on its active rows only."""

    def __init__(self, installed: _Installed, branch: Branch):
        self.installed = installed
        self.layer = branch.layer
        self.adds_residual = branch.adds_residual
        self.kind = type(branch.entry)
        if not _is_routed(branch.entry):
            _OUTPUTS[self.kind] = 0
        self.pending: tuple[Tensor, Decision] | None = None
        self.branch = branch

    @functools.cached_property
    def on_device(self) -> OnDevice | None:
        return None if self.adds_residual else OnDevice.of(self.branch, self.installed.gate, self.installed.standin)

    def whole(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)
        first = next(iter(signature.parameters))

        def run(rows: Tensor | None, lead: tuple[int, ...], args: Any, kwargs: Any) -> tuple[Tensor, list[Any]]:
            if rows is not None:
                args = [_packed(value, rows, lead) for value in args]
                kwargs = {name: _packed(value, rows, lead) for name, value in kwargs.items()}
            result = original(*args, **kwargs)
            out, *others = result if isinstance(result, tuple) else (result,)
            _OUTPUTS[self.kind] = len(others)
            return out, others

        def forward(*args: Any, **kwargs: Any) -> Any:
            x = args[0] if args else kwargs[first]
            flat, lead = x.reshape(-1, x.shape[-1]), x.shape[:-1]
            found = self.installed.decided(self.layer, flat)
            if found is not None and may_pack(flat) and self.on_device is not None:
                return self.on_device(flat, found.skips.to(flat.device)).view(x.shape)
            if found is None or found.everyone:
                out, others = run(None, lead, args, kwargs)
                return (out, *others) if others else out
            residual = None
            if self.adds_residual:
                residual = signature.bind(*args, **kwargs).arguments[RESIDUAL].reshape(flat.shape)
            result: Tensor | None = None
            rows = found.rows.to(flat.device)
            if rows.numel():
                result, others = run(rows, lead, args, kwargs)
            else:
                if self.kind not in _OUTPUTS:  # one row, once for this kind of MLP: what does the layer unpack?
                    run(rows.new_zeros(1), lead, args, kwargs)
                others = [None] * _OUTPUTS[self.kind]
            blended = found.blend(self.installed.standin, self.layer, flat, result, residual).view(x.shape)
            return (blended, *others) if others else blended

        return forward

    def enter(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            found = self.installed.decided(self.layer, x.reshape(-1, x.shape[-1]))
            if found is None or found.everyone:
                self.pending = None
                return original(x, *args, **kwargs)
            self.pending = x, found
            return original(_packed(x, found.rows.to(x.device), x.shape[:-1]), *args, **kwargs)

        return forward

    def leave(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(packed: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.pending is None:
                return original(packed, *args, **kwargs)
            x, found = self.pending
            self.pending = None
            result = original(packed, *args, **kwargs) if found.rows.numel() else None
            return found.blend(self.installed.standin, self.layer, x.reshape(-1, x.shape[-1]), result).view(x.shape)

        return forward


def _is_routed(block: nn.Module) -> bool:
    """Whether an MLP is more than linear maps and activations; only such a one returns more than its rows."""
    return any(p.dim() > 2 for p in block.parameters()) or any(
        True for child in block.children() for _ in child.children()
    )


def _packed(value: Any, rows: Tensor, lead: tuple[int, ...]) -> Any:
    """The chosen rows of a tensor that has one entry per token, in the rank it came with: [n, H] or [1, n, H]."""
    if not isinstance(value, Tensor) or value.shape[: len(lead)] != lead:
        return value
    tail = value.shape[len(lead) :]
    return value.reshape(-1, *tail)[rows].view(*[1] * (len(lead) - 1), rows.numel(), *tail)
