"""The next token, chosen on the device: the best one, or one drawn with temperature, top-k and top-p.

choose = make_chooser(options)
token, entropy, logprob = choose(logits, ops)         # [rows] int64, [rows] float32 (bits), [rows] float32 (nats)

Entropy and log-probability are of the model's own distribution, before temperature and cuts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sedac_cli.runtime.generate import GenerateOptions
from sedac_cli.runtime.graph.ops import Ops

Chooser = Callable[[Tensor, Ops], tuple[Tensor, Tensor, Tensor]]


def chooser_key(options: GenerateOptions) -> tuple[float, float, int]:
    """What a captured graph is made for."""
    return (0.0, 1.0, 0) if options.temperature <= 0 else (options.temperature, options.top_p, options.top_k)


def make_chooser(options: GenerateOptions) -> Chooser:
    temperature, top_p, top_k = chooser_key(options)

    def best(logits: Tensor, ops: Ops) -> tuple[Tensor, Tensor, Tensor]:
        found = ops.entropy(logits)
        return found.argmax, found.entropy, found.confidence.log()

    def draw(logits: Tensor, ops: Ops) -> tuple[Tensor, Tensor, Tensor]:
        probabilities = shaped(logits, temperature, top_p, top_k)
        # The largest of p / e with e ~ Exp(1) is a draw from p, and needs no host.
        noise = torch.empty_like(probabilities).exponential_()
        token, found = (probabilities / noise).argmax(dim=-1), ops.entropy(logits)
        # log p(x) = x - max + log p(max): no second pass over the logits for log Z.
        picked, top = (logits.gather(1, i.unsqueeze(1)).squeeze(1).float() for i in (token, found.argmax))
        return token, found.entropy, picked - top + found.confidence.log()

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
