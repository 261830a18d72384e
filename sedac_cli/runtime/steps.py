"""Forward passes over a cache that can take tokens back, for one sequence or a batch whose rows keep different numbers.

Always true: rows stay in step in the cache; a slot that holds what a row did not keep is masked for that row for good,
and positions are counted over the slots that are not.
"""

from __future__ import annotations

import inspect
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from sedac_cli.errors import InputError
from sedac_cli.models import LoadedModel
from sedac_cli.runtime.past import handing

# Kinds of layers whose cache is one entry per token: it can be cut. A recurrent state cannot.
CUTTABLE = {"full_attention", "sliding_attention", "chunked_attention"}
WINDOWED = {"sliding_attention", "chunked_attention"}
TIMED = 3


class Steps:
    """`valid` [B, slots]: which cache slots count for each row."""

    def __init__(self, loaded: LoadedModel):
        from transformers import DynamicCache

        refuse_uncuttable(loaded)
        self.model, self.device = loaded.model, loaded.device
        takes = inspect.signature(self.model.forward).parameters
        self.positions = "position_ids" in takes
        self.keeps = "logits_to_keep" in takes
        # Without a config every layer keeps all its tokens, windowed ones too: their window is in the mask.
        self.cache: Any = DynamicCache()
        self.given = {**handing(self.model, self.cache), "use_cache": True}
        self.valid = torch.empty(0)
        self.fresh = 0
        self.limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @staticmethod
    def no_batches(loaded: LoadedModel) -> str | None:
        """Rows that keep different numbers of tokens leave gaps between slots: who counts slots would miscount."""
        name = type(loaded.model).__name__
        if "position_ids" not in inspect.signature(loaded.model.forward).parameters:
            return f"{name} counts positions itself"
        if _has_window(loaded):
            return f"{name} has layers with an attention window"
        return None

    def prefill(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits [B, 1, V] after the prompts."""
        self.valid = mask.bool()
        position = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
        extra = {"logits_to_keep": 1} if self.keeps else {}
        logits = self._run(ids, self.valid, position, extra)
        croppable = getattr(self.cache, "is_croppable", True)
        if not (croppable() if callable(croppable) else croppable):
            raise InputError(f"the cache of {type(self.model).__name__} cannot take tokens back: no lossless drafts")
        return logits[:, -1:]

    def forward(self, rows: list[list[int]]) -> Tensor:
        """[B, n, V]: n more tokens for each row."""
        ids = torch.tensor(rows, device=self.device)
        position = self.valid.sum(-1, keepdim=True) + torch.arange(ids.shape[1], device=self.device)
        self.valid = torch.cat([self.valid, torch.ones_like(ids, dtype=torch.bool)], dim=1)
        self.fresh = ids.shape[1]
        return self._run(ids, self.valid, position, {})

    def undo(self, count: int) -> None:
        """Take the last `count` slots back from every row."""
        self.cache.crop(-count)
        self.valid = self.valid[:, :-count]

    def keep(self, counts: list[int]) -> None:
        """Of what the last pass wrote, row b keeps its first `counts[b]` tokens."""
        kept = max(counts)
        if kept < self.fresh:
            self.undo(self.fresh - kept)
        if min(counts) < kept:
            number = torch.arange(kept, device=self.device)
            self.valid[:, -kept:] = number < torch.tensor(counts, device=self.device).unsqueeze(1)

    def dense_step_seconds(self, tokens: list[int]) -> float:
        """What one dense step of one token takes here and now; the cache is as it was afterwards."""
        seconds = []
        for _ in range(TIMED):
            began = time.perf_counter()
            self.forward([[token] for token in tokens]).argmax(-1).tolist()
            seconds.append(time.perf_counter() - began)
            self.undo(1)
        return statistics.median(seconds)

    def _run(self, ids: Tensor, valid: Tensor, position: Tensor, extra: dict[str, Any]) -> Tensor:
        if self.limit:  # only what a row will not keep can lie beyond the last position
            position = position.clamp_max(self.limit - 1)
        placed: dict[str, Any] = {"position_ids": position} if self.positions else {}
        return self.model(input_ids=ids, attention_mask=valid.long(), **self.given, **placed, **extra).logits


def _layer_types(loaded: LoadedModel) -> list[str]:
    return list(getattr(loaded.model.config.get_text_config(), "layer_types", None) or [])


def _has_window(loaded: LoadedModel) -> bool:
    config = loaded.model.config.get_text_config()
    if kinds := _layer_types(loaded):
        return bool(WINDOWED & set(kinds))
    return getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)


def refuse_uncuttable(loaded: LoadedModel) -> None:
    others = sorted(set(_layer_types(loaded)) - CUTTABLE)
    name = type(loaded.model).__name__
    if getattr(loaded.model, "_is_stateful", False) or others:
        what = f"layers of kind {', '.join(others)}" if others else "a recurrent state"
        raise InputError(
            f"{name} has {what}: its cache cannot take tokens back, so drafts cannot be undone",
            hint="generate without --lossless",
        )
