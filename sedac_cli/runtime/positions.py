"""Which rows of a batch are tokens, and where each stands in its own sequence, whatever form the mask comes in.

Always true: left padding, a cache, a static cache (mask longer than what was seen), chunks of a prompt and packed
sequences all give a token the position it would have alone. The sink guard and the counters stand on this.

    position, real = positions((B, T), attention_mask, position_ids, past=0, device=ids.device)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def positions(
    shape: tuple[int, ...], mask: Any, position_ids: Any, past: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(position counted from 0, whether the row is a token at all): both [B*T]. `past` tokens are in the cache."""
    B, T = shape
    position = torch.arange(past, past + T, device=device).expand(B, T)
    real = torch.ones(B, T, dtype=torch.bool, device=device)
    mask = _widest(mask)
    if mask is not None and mask.dim() == 2 and mask.shape[1] >= T:
        position, real = _from_padding(mask.to(device), past, T)
    elif mask is not None and mask.dim() == 4:
        position, real = _from_attention(mask.to(device), past, T)
    if isinstance(position_ids, Tensor) and position_ids.dim() == 2 and position_ids.shape[1] == T:
        # Ids that start anew are packed sequences; ids that ignore left padding are too large. The smaller is right.
        position = torch.minimum(position, position_ids.to(device).expand(B, T))
    return position.expand(B, T).reshape(-1), real.expand(B, T).reshape(-1)


def _widest(mask: Any) -> Tensor | None:
    """The mask that sees most, where a model keeps one per kind of attention: a window hides how far back a row is."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next((m for m in mask.values() if isinstance(m, Tensor)), None))
    return mask if isinstance(mask, Tensor) else None


def _from_padding(mask: Tensor, past: int, T: int) -> tuple[Tensor, Tensor]:
    """[B, K] of 1 for tokens. K may be T alone, past + T, or all of a static cache."""
    seen = mask.long()
    if mask.shape[1] < past + T:  # only this chunk is described: what lies before it counts as tokens
        return (seen.cumsum(1) - 1).clamp_min(0)[:, -T:] + past, seen[:, -T:].bool()
    return (seen.cumsum(1) - 1).clamp_min(0)[:, past : past + T], seen[:, past : past + T].bool()


def _from_attention(mask: Tensor, past: int, T: int) -> tuple[Tensor, Tensor]:
    """[B, 1, T, K], boolean or additive: a token attends to itself, and to as many others as stand before it."""
    allowed = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    allowed = allowed[:, -T:]
    position = (allowed.sum(-1) - 1).clamp_min(0)
    if allowed.shape[-1] < past + T:  # a cache that keeps only a window: its columns have no absolute place
        return position, allowed.any(-1)
    return position, allowed[:, :, past : past + T].diagonal(dim1=1, dim2=2)
