"""See the K and V that attention makes, before and after its rotary embedding, whatever the family calls its projections.

A decoder layer is handed something with the one method of a cache that attention calls, `update(key, value, layer)`, in the
place of its cache. So fused projections and normed keys need no case of their own.

    with recording(decoder, (7, 8)) as seen:
        decoder.last_hidden(ids)
    seen[7].key, seen[7].value           # [B, T, heads, head_dim], key before rotary
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sedac_cli.errors import InputError
from sedac_cli.runtime.past import name_in
from sedac_cli.structure import Decoder, describe

ANGLES = "position_embeddings"
MASKED = ("sdpa", "eager")
SHIFT, MOST_DRIFT = 37, 0.15
"""Two starts of one sequence; keys may drift by this share of their norm, because bfloat16 adds up over the layers. Keys
turned otherwise drift by more than half of it."""

_CHECKED: weakref.WeakKeyDictionary[nn.Module, dict[Any, tuple[int, int]]] = weakref.WeakKeyDictionary()
"""What `check_attention` found, by backbone: a context is opened for every batch of an evaluation."""


@dataclass
class Seen:
    """Of one layer: K before rotary and V [B, T, heads, head_dim], and the states entering and leaving it [B, T, H]."""

    key: Tensor
    value: Tensor
    entering: Tensor
    leaving: Tensor


def rotated(k: Tensor, angles: tuple[Tensor, Tensor], back: bool = False) -> Tensor:
    """[B, T, heads, head_dim] with rotary applied, or taken back exactly. Dimensions beyond the angles stay."""
    cos, sin = (x.unsqueeze(2).float() for x in angles)
    width = cos.shape[-1]
    turned, rest = k[..., :width].float(), k[..., width:]
    low, high = turned.chunk(2, dim=-1)
    half = torch.cat((-high, low), dim=-1)
    found = (turned * cos - half * sin) / (cos * cos + sin * sin) if back else turned * cos + half * sin
    return torch.cat((found.to(k.dtype), rest), dim=-1)


@dataclass(frozen=True)
class LayerCall:
    """How a decoder layer is called: every argument by its name."""

    signature: inspect.Signature

    @classmethod
    def of(cls, layer: nn.Module) -> LayerCall:
        return cls(inspect.signature(layer.forward))

    @property
    def hidden(self) -> str:
        return next(iter(self.signature.parameters))

    @property
    def cache(self) -> str | None:
        return name_in(self.signature)

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        found = dict(self.signature.bind(*args, **kwargs).arguments)
        return found | found.pop("kwargs", {})


class _Recorder:
    """Stands where the cache would; keeps what it is handed."""

    def __init__(self) -> None:
        self.handed: list[tuple[Tensor, Tensor]] = []

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.handed.append((key, value))
        return key, value


@contextlib.contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another `forward` for a while."""
    saved = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        if saved is None:
            del module.forward
        else:
            module.forward = saved


@contextlib.contextmanager
def recording(decoder: Decoder, layers: tuple[int, ...]) -> Iterator[dict[int, Seen]]:
    """Keep what these layers make in the passes (without a cache) run meanwhile; the last pass's stays."""
    seen: dict[int, Seen] = {}
    with contextlib.ExitStack() as stack:
        for layer in layers:
            module = decoder.layers[layer]
            call = LayerCall.of(module)
            _require(decoder, layer, call)

            def forward(
                *args: Any, _layer: int = layer, _call: LayerCall = call, _own: Any = module.forward, **kwargs: Any
            ) -> Any:
                given = _call.named(args, kwargs)
                recorder = _Recorder()
                out = _own(**given | {str(_call.cache): recorder})
                if len(recorder.handed) != 1 or not isinstance(out, Tensor):
                    raise refused(decoder, _layer, "its attention does not hand one key and one value to a cache")
                key, value = (x.transpose(1, 2) for x in recorder.handed[0])
                seen[_layer] = Seen(rotated(key, given[ANGLES], back=True), value, given[_call.hidden], out)
                return out

            stack.enter_context(replaced(module, forward))
        yield seen


@torch.no_grad()
def check_attention(decoder: Decoder, layers: tuple[int, ...]) -> tuple[int, int]:
    """(heads, head_dim) of K and V; refuses, with its structure, attention whose K is not rotary as understood here.

    The proof needs no names: keys with the rotation taken back must not depend on where the sequence starts.
    """
    name = getattr(decoder.model.config, "_attn_implementation", None)
    known = _CHECKED.setdefault(decoder.backbone, {})
    if (name, layers) in known:
        return known[name, layers]
    if name not in MASKED:
        raise InputError(
            f"ghost K and V need attention that takes a mask of its own, not '{name}'",
            hint="load the model with attn_implementation='sdpa'",
        )
    ids = torch.arange(8, device=decoder.device).unsqueeze(0) % decoder.vocab_size
    found = []
    for begin in (0, SHIFT):
        with recording(decoder, layers) as seen:
            decoder.model(input_ids=ids, position_ids=torch.arange(begin, begin + 8, device=ids.device)[None],
                          use_cache=False)  # fmt: skip
        found.append(seen)
    for layer in layers:
        one, two = (x[layer].key.float() for x in found)
        if (one - two).norm() > MOST_DRIFT * one.norm():
            raise refused(decoder, layer, "its keys are not rotated by position as in Llama, Mistral and Qwen")
    made = [part for x in found for layer in layers for part in (x[layer].key, x[layer].value)]
    shapes = {(part.shape[2], part.shape[3]) for part in made}
    if len(shapes) != 1:
        raise refused(decoder, layers[0], f"keys and values of several shapes: {sorted(shapes)}")
    known[name, layers] = heads, head_dim = shapes.pop()
    return heads, head_dim


def _require(decoder: Decoder, layer: int, call: LayerCall) -> None:
    if call.cache is None or ANGLES not in call.signature.parameters:
        missing = ANGLES if call.cache else "cache"
        raise refused(decoder, layer, f"it takes no {missing}")


def refused(decoder: Decoder, layer: int, why: str) -> InputError:
    module = decoder.layers[layer]
    return InputError(
        f"{type(decoder.model).__name__} cannot have ghost K and V: {type(module).__name__} {layer}: {why}\n"
        + describe(module)
    )
