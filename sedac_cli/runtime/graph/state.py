"""What a decode step reads and writes on the device: the last tokens, where they stand, the cache, and the record.

Every sequence of a batch ends at the same place of the cache (prompts are padded on the left), so one number, `slot`, says
where the next key goes; `first` says where each sequence begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sedac_cli.errors import InputError
from sedac_cli.models import LoadedModel
from sedac_cli.runtime.graph.capture import EAGER
from sedac_cli.runtime.past import handing


@dataclass(frozen=True)
class State:
    """tokens, position, first, finished: [rows]; slot: [1]."""

    tokens: Tensor
    position: Tensor
    first: Tensor
    finished: Tensor
    slot: Tensor

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> State:
        def zeros(size: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        return cls(zeros(rows), zeros(rows), zeros(rows), zeros(rows, torch.bool), zeros(1))

    def reset(self) -> None:
        for tensor in (self.tokens, self.position, self.first, self.finished, self.slot):
            tensor.zero_()


@dataclass(frozen=True)
class Choice:
    """The next tokens, and of the distribution they were chosen from, [rows] each: its entropy in bits, its largest probability,
    and by how much the token's logit is above the best one, so never more than 0 (None: it is the best one)."""

    token: Tensor
    entropy: Tensor
    confidence: Tensor
    above: Tensor | None = None

    @property
    def logprob(self) -> Tensor:
        """Of the token, in nats: log p(x) = x - max + log p(max), so no second pass over the logits for log Z."""
        best = self.confidence.log()
        return best if self.above is None else self.above + best


@dataclass
class Burst:
    """Recorded by the steps of one graph. tokens, entropy, logprob [steps, rows]; needs [steps, layers]; finished [rows]."""

    tokens: Tensor
    needs: Tensor
    entropy: Tensor
    logprob: Tensor
    finished: Tensor

    @classmethod
    def empty(cls, steps: int, rows: int, layers: int, device: torch.device | str, pinned: bool = False) -> Burst:
        def make(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device, pin_memory=pinned)

        return cls(
            make(steps, rows, dtype=torch.long), make(steps, layers, dtype=torch.int32), make(steps, rows, dtype=torch.float32),
            make(steps, rows, dtype=torch.float32), make(rows, dtype=torch.bool),
        )  # fmt: skip

    def copy_(self, other: Burst) -> None:
        for to, source in zip(vars(self).values(), vars(other).values(), strict=True):
            to.copy_(source, non_blocking=True)

    def at(self, step: int) -> Burst:
        """What one step writes."""
        return Burst(self.tokens[step], self.needs[step], self.entropy[step], self.logprob[step], self.finished)


class KVCache:
    """Keys and values of every layer: [rows, heads, places, size]."""

    def __init__(self, loaded: LoadedModel, rows: int, places: int):
        self.rows, self.places = rows, places
        self.layers: list[tuple[Tensor, Tensor]] = []
        probe = prompt_cache(loaded, torch.zeros(1, 2, dtype=torch.long, device=loaded.device))
        for key, value in probe:
            self.layers.append(
                tuple(x.new_zeros(rows, x.shape[1], places, x.shape[3]) for x in (key, value))  # type: ignore[arg-type]
            )

    def load(self, prompt: list[tuple[Tensor, Tensor]], width: int) -> None:
        """What the prompt pass left; a layer with a window may have kept only its end. All else is cleared: what a mask leaves
        out is added with weight 0, and 0 times a NaN of the last call would be one."""
        for (keys, values), (key, value) in zip(self.layers, prompt, strict=True):
            for to, source in ((keys, key), (values, value)):
                kept = source.shape[2]
                to.zero_()
                to[: source.shape[0], :, width - kept : width].copy_(source)


@torch.inference_mode()
def prompt_cache(loaded: LoadedModel, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    from transformers import DynamicCache

    cache = DynamicCache(config=loaded.model.config)
    try:
        loaded.model(input_ids=ids, use_cache=True, **handing(loaded.model, cache))
    except (TypeError, ValueError, AttributeError) as error:  # a cache of the model's own
        raise no_keys(loaded) from error
    return cache_layers(loaded, cache)


def no_keys(loaded: LoadedModel) -> InputError:
    return InputError(
        f"{type(loaded.model).__name__} keeps no keys and values per layer: the graph engine cannot serve it",
        hint=EAGER,
    )


def cache_layers(loaded: LoadedModel, cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer, or an error for a model that remembers in another way."""
    layers = getattr(cache, "layers", [])
    found = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    good = len(found) == loaded.decoder.num_layers and all(
        isinstance(k, Tensor) and isinstance(v, Tensor) and k.dim() == 4 and k.shape[:3] == v.shape[:3]
        for k, v in found
    )
    if not good:
        raise no_keys(loaded)
    return found  # type: ignore[return-value]
