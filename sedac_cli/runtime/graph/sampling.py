"""The next token, chosen on the device: the best one, or one drawn with temperature, top-k and top-p.

choose = make_chooser(options)
token, entropy = choose(logits, ops)         # [rows] int64, [rows] float32 (bits)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sedac_cli.runtime.generate import GenerateOptions
from sedac_cli.runtime.graph.ops import Ops

Chooser = Callable[[Tensor, Ops], tuple[Tensor, Tensor]]


def chooser_key(options: GenerateOptions) -> tuple[float, float, int]:
    """What a captured graph is made for."""
    return (0.0, 1.0, 0) if options.temperature <= 0 else (options.temperature, options.top_p, options.top_k)


def make_chooser(options: GenerateOptions) -> Chooser:
    temperature, top_p, top_k = chooser_key(options)

    def best(logits: Tensor, ops: Ops) -> tuple[Tensor, Tensor]:
        found = ops.entropy(logits)
        return found.argmax, found.entropy

    def draw(logits: Tensor, ops: Ops) -> tuple[Tensor, Tensor]:
        probabilities = shaped(logits, temperature, top_p, top_k)
        # The largest of p / e with e ~ Exp(1) is a draw from p, and needs no host.
        noise = torch.empty_like(probabilities).exponential_()
        return (probabilities / noise).argmax(dim=-1), ops.entropy(logits).entropy

    return best if temperature <= 0 else draw


def shaped(logits: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """Probabilities after temperature, top-k and top-p, in that order, as transformers applies them."""
    scores = logits.float() / temperature
    if top_k:
        least = scores.topk(min(top_k, scores.shape[-1]), dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < least, float("-inf"))
    if top_p < 1.0:
        ordered, index = scores.sort(dim=-1, descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
        ordered = ordered.masked_fill(before >= top_p, float("-inf"))
        scores = torch.empty_like(scores).scatter_(-1, index, ordered)
    return scores.softmax(dim=-1)
