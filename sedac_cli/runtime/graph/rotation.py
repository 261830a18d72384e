"""Whether every layer turns its keys as the model's one rotary module says: measured, since each family marks in a way of its own
the layers that do not (`use_rope`, `no_rope_layers`, a kind of layer, a window).

A token alone attends to nothing but itself, so its hidden states are the same wherever it stands. What then differs between the
keys it leaves at two places is what positions did to them: two passes of one token, however far off the place. Attention that asks
for positions beside their cosines and sines is called with two of them: it must not care.

    check_rotation(decoder, rotary, place=last_place(decoder, max_length))        # or NotStandardError, with the layer
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from sedac_cli.runtime.graph.standard import NotStandardError
from sedac_cli.runtime.past import handing
from sedac_cli.structure import Decoder

FIXED = {"default", "linear", "llama3", "yarn", "proportional"}
"""Kinds of rotary positions whose frequencies transformers computes once; those of `dynamic` and `longrope` follow the length."""
TOKENS = 8
"""Asked about, each alone: the key of one may happen to be nothing."""
FAR = 0.5
"""Off by this share of what positions change. Not turned at all is 1; rounding to bfloat16, beside large biases too, is below 0.1."""


def last_place(decoder: Decoder, length: int) -> int:
    """The last position that sequences of this length and the model both have; 0 where the model names no number.

    Where frequencies follow the length it is one at which they are still the first ones: to ask beyond it would change them."""
    config = decoder.model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int):
        return 0
    rotary = getattr(decoder.backbone, "rotary_emb", None)
    kind = getattr(rotary, "rope_type", "default")  # where layers differ, a dict of kinds
    if not set(kind.values() if isinstance(kind, dict) else [kind]) <= FIXED:
        named = getattr(config, "rope_parameters", None) or {}
        firsts = (named.get("original_max_position_embeddings"), getattr(rotary, "original_max_seq_len", None))
        limit = min(limit, *(n for n in firsts if isinstance(n, int)))
    return max(0, min(limit, length) - 1)


@torch.inference_mode()
def check_rotation(decoder: Decoder, rotary: nn.Module, place: int) -> None:
    place = max(1, place)
    ids = torch.randint(0, decoder.vocab_size, (TOKENS, 1), generator=torch.Generator().manual_seed(0)).to(
        decoder.device
    )
    stays, turns = (_keys(decoder, ids, position) for position in (0, place))
    tables = [_table(rotary, stays[0], position) for position in (0, place)]
    for layer, (key, found) in enumerate(zip(stays, turns, strict=True)):
        plain = _turned(key, *tables[0], back=True)
        expected = _turned(plain, *tables[1])
        off, moved = (found.float() - expected).norm(), (expected - key.float()).norm()
        if not off <= FAR * moved:
            still = (found.float() - key.float()).norm() <= FAR * moved
            raise NotStandardError(
                f"layer {layer} does not rotate its keys"
                if still
                else f"layer {layer} rotates its keys in a way of its own"
            )
    for layer, module in enumerate(decoder.layers):
        if _heeds_positions(module.self_attn, stays[layer], tables[0], place, decoder.hidden_size):
            raise NotStandardError(f"the attention of layer {layer} does more with positions than rotate")


def _heeds_positions(attention: Any, like: Tensor, turns: tuple[Tensor, Tensor], place: int, width: int) -> bool:
    """Queries that grow with the position (Ministral 3) leave no trace in the keys."""
    if "position_ids" not in inspect.signature(attention.forward).parameters:
        return False
    x = torch.randn(1, 2, width, generator=torch.Generator().manual_seed(0)).to(like)
    cos, sin = (table.to(x).expand(1, 2, -1) for table in turns)
    ids = torch.arange(2, device=x.device).unsqueeze(0)
    given = {"hidden_states": x, "position_embeddings": (cos, sin), "attention_mask": None}
    try:
        first, second = (attention(**given, position_ids=ids + begin)[0] for begin in (0, max(0, place - 1)))
    except TypeError as error:
        raise NotStandardError(f"its attention takes other arguments ({error})") from None
    return not torch.equal(first, second)


def _keys(decoder: Decoder, ids: Tensor, position: int) -> list[Tensor]:
    """Of each layer, [tokens, heads, 1, size], every token alone at that position."""
    from transformers import DynamicCache

    cache: Any = DynamicCache(config=decoder.model.config)
    try:
        decoder.backbone(
            input_ids=ids,
            position_ids=torch.full_like(ids, position),
            use_cache=True,
            **handing(decoder.backbone, cache),
        )
        return [layer.keys for layer in cache.layers]
    except (TypeError, AttributeError) as error:
        raise NotStandardError(f"its positions cannot be given ({error})") from None


def _table(rotary: nn.Module, like: Tensor, position: int) -> tuple[Tensor, Tensor]:
    ids = torch.full((1, 1), position, dtype=torch.long, device=like.device)
    cos, sin = rotary(like[:1, 0], ids)
    return cos.float(), sin.float()


def _turned(key: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    """As the kernels do it: the leading part, its halves against each other. `back`: what is turned so becomes `key`."""
    size = cos.shape[-1]
    part, rest = key.float()[..., :size], key.float()[..., size:]
    half = size // 2
    if back:
        scale = cos.square() + sin.square()
        cos, sin = cos / scale, -sin / scale
    other = torch.cat([-part[..., half:], part[..., :half]], dim=-1)
    return torch.cat([part * cos + other * sin, rest], dim=-1)
