"""Whole layers skipped, attention included, inside any Hugging Face model with rotary attention.

Tokens that run are packed and go through the layer alone; the K and V that the layer then hands to its cache are completed
with the ghosts of those that are away, so tokens that run, now and later, attend to all. A token that is away costs its
ghost K and V in these layers and nothing else (sequences of a batch are padded to the one with most tokens running).

    with skipping(model, SpanGate(gate, ghost.layers), ghost) as run:
        model.generate(**inputs)
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sedac_cli.errors import InputError, UsageError
from sedac_cli.gates.span import SpanGate
from sedac_cli.runtime.kv import ANGLES, LayerCall, check_attention, rotated
from sedac_cli.runtime.skip import SkipRun, _Installed
from sedac_cli.standins import StandIn


class Ghost(Protocol):
    """What predicts K and V: `standins.ghost.GhostKV`, or what it is compared with."""

    layers: tuple[int, ...]

    def __call__(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor]: ...

    def leave(self, hidden: Tensor) -> Tensor: ...


class GhostInstalled(_Installed):
    """The hooks of an open context in which tokens skip whole layers."""

    def __init__(self, run: SkipRun, standin: StandIn, ghost: Ghost):
        super().__init__(run, standin)
        self.ghost = ghost
        gate = self.gate
        if not isinstance(gate, SpanGate) or gate.layers != ghost.layers:
            raise UsageError(
                f"ghost K and V of layers {ghost.layers} need a gate that decides about just these layers",
                hint="runtime.plan.make_plan gives both: ghost:FILE@GATE",
            )
        heads, head_dim = check_attention(run.decoder, ghost.layers)
        shape = getattr(ghost, "heads", heads), getattr(ghost, "head_dim", head_dim)
        if shape != (heads, head_dim):
            raise InputError(f"ghost K and V of {shape[0]} x {shape[1]}, the model's are {heads} x {head_dim}")
        if isinstance(ghost, nn.Module):
            ghost.to(run.decoder.device)

    def install(self) -> None:
        super().install()
        for layer in self.ghost.layers:
            module = self.run.decoder.layers[layer]
            self.replace(module, self.wrapped(layer, LayerCall.of(module), module.forward))

    def wrap(self, branch: Any) -> None:
        """MLPs are left alone: what skips, skips the layer."""

    def wrapped(self, layer: int, call: LayerCall, original: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            given = call.named(args, kwargs)
            hidden = given[call.hidden]
            away = self.away(layer, hidden)
            if away is None:
                return original(*args, **kwargs)
            assert self.state is not None
            run = ~away & self.state.real.view(self.state.shape).to(hidden.device)
            patch = _Patch(layer, given.get(str(call.cache)), run, *self.ghosts(layer, hidden, away, given[ANGLES]))
            if patch.sequences.numel():
                out = original(**patch.packed(given, call, self.additive))
                if patch.updates != 1:
                    raise InputError(f"the attention of layer {layer} went past its cache: ghost K and V were not seen")
                hidden = patch.unpacked(hidden, out)
            else:
                patch.update_alone()
            if layer == self.ghost.layers[-1]:
                left = self.ghost.leave(given[call.hidden][away])
                hidden = hidden.masked_scatter(away.unsqueeze(-1), left.to(hidden.dtype))
            return hidden

        return forward

    @property
    def additive(self) -> bool:
        return self.run.decoder.model.config._attn_implementation == "eager"

    def away(self, layer: int, hidden: Tensor) -> Tensor | None:
        """[B, T], or None when every token runs and the layer is left alone."""
        state = self.state
        if state is None:
            return None
        if hidden.shape[:2] != state.shape:
            raise InputError(
                f"layer {layer} sees rows {list(hidden.shape[:2])} where {list(state.shape)} tokens went in"
            )
        skips = state.scale == 0
        self.skipped[layer] += skips.sum()
        assert self.counts is not None
        self.counts += skips
        return skips.view(state.shape).to(hidden.device) if bool(skips.any()) else None

    def ghosts(self, layer: int, hidden: Tensor, away: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """K with rotary applied, and V: [B, heads, T, head_dim], zero where a token is not away."""
        k, v = self.ghost(layer, hidden[away])
        shape = (*away.shape, *k.shape[1:])
        mask = away[..., None, None]
        whole_k = k.new_zeros(shape).masked_scatter(mask, k)
        whole_v = v.new_zeros(shape).masked_scatter(mask, v)
        return rotated(whole_k, angles).transpose(1, 2), whole_v.transpose(1, 2)


class _Patch:
    """One layer of one pass: packs the tokens that run, and is the cache that their attention is handed."""

    def __init__(self, layer: int, cache: Any, run: Tensor, k: Tensor, v: Tensor):
        self.layer, self._cache, self.run, self.k, self.v = layer, cache, run, k, v
        self.updates = 0
        self.sequences = torch.nonzero(run.any(dim=1)).squeeze(-1)
        self.width = int(run.sum(dim=1).max())
        self.mine = run[self.sequences]
        first = torch.argsort((~self.mine).int(), dim=1, stable=True)
        self.order = first[:, : self.width]  # [B', R]; a sequence with fewer is filled up with tokens thrown away later
        self.slot = (self.mine.long().cumsum(dim=1) - 1).clamp_min(0)  # [B', T]: place of a token among those that run

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    # In -----------------------------------------------------------------------------------------------------------

    def packed(self, given: dict[str, Any], call: LayerCall, additive: bool) -> dict[str, Any]:
        """The layer's arguments for the tokens that run alone."""
        call_with = dict(given)
        call_with[call.hidden] = self.rows(given[call.hidden])
        call_with[ANGLES] = tuple(self.rows(x) for x in given[ANGLES])
        if isinstance(given.get("position_ids"), Tensor):
            call_with["position_ids"] = self.rows(given["position_ids"])
        call_with["attention_mask"] = self.mask(given.get("attention_mask"), given[call.hidden], additive)
        call_with[str(call.cache)] = self
        return call_with

    def rows(self, x: Tensor) -> Tensor:
        """[B or 1, T, ...] -> [B', R, ...]."""
        x = x.expand(self.run.shape[0], *x.shape[1:])[self.sequences]
        index = self.order.view(*self.order.shape, *[1] * (x.dim() - 2)).expand(*self.order.shape, *x.shape[2:])
        return x.gather(1, index)

    def mask(self, mask: Any, hidden: Tensor, additive: bool) -> Tensor | None:
        """[B', 1, R, K]. No mask means: to every token before, and one token alone sees all there is."""
        B, T = self.run.shape
        if mask is None:
            if T == 1:
                return None
            past = 0 if self._cache is None else int(self._cache.get_seq_length(self.layer))
            keys = torch.arange(past + T, device=hidden.device)
            seen = (keys <= (self.order + past).unsqueeze(-1)).unsqueeze(1)
            if not additive:
                return seen
            return torch.zeros(seen.shape, dtype=hidden.dtype, device=hidden.device).masked_fill_(
                ~seen, torch.finfo(hidden.dtype).min
            )
        if not isinstance(mask, Tensor) or mask.dim() != 4:
            raise InputError(f"ghost K and V need an attention mask of four dimensions, not {type(mask).__name__}")
        mask = mask.expand(B, *mask.shape[1:])[self.sequences]
        index = self.order[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
        return mask.gather(2, index)

    # The cache ----------------------------------------------------------------------------------------------------

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """[B', heads, R, head_dim] of those that run -> K and V of everybody, past included."""
        self.updates += 1
        k, v = self.whole(key, self.k), self.whole(value, self.v)
        if self._cache is not None:
            k, v = self._cache.update(k, v, layer, *args, **kwargs)
        if len(self.sequences) == self.run.shape[0]:
            return k, v
        return k[self.sequences], v[self.sequences]

    def whole(self, own: Tensor, ghost: Tensor) -> Tensor:
        ghost = ghost.to(own.dtype)
        index = self.slot[:, None, :, None].expand(-1, own.shape[1], -1, own.shape[3])
        merged = torch.where(self.mine[:, None, :, None], own.gather(2, index), ghost[self.sequences])
        return merged if len(merged) == len(ghost) else ghost.index_copy(0, self.sequences, merged)

    def update_alone(self) -> None:
        """Nobody runs: the cache still has to know who was there."""
        if self._cache is not None:
            self._cache.update(self.k, self.v, self.layer)

    # Out ----------------------------------------------------------------------------------------------------------

    def unpacked(self, hidden: Tensor, out: Tensor) -> Tensor:
        """The layer's rows in their places; the others as they came."""
        picked = out.gather(1, self.slot.unsqueeze(-1).expand(-1, -1, out.shape[-1]))
        merged = torch.where(self.mine.unsqueeze(-1), picked, hidden[self.sequences].to(out.dtype))
        return merged if len(merged) == len(hidden) else hidden.to(out.dtype).index_copy(0, self.sequences, merged)
