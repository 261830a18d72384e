"""The next token, chosen on the device: the best one, or one drawn with temperature, top-k and top-p.

settings = Settings.on(device)
choose = make_chooser(options, settings)
settings.set(options)
choice = choose(logits, ops)         # the tokens, and what is known of them

Entropy and log-probability are of the model's own distribution, before temperature and cuts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sedac_cli.runtime.generate import GenerateOptions
from sedac_cli.runtime.graph.ops import Ops
from sedac_cli.runtime.graph.state import Choice

Chooser = Callable[[Tensor, Ops], Choice]


@dataclass(frozen=True)
class Settings:
    """What a captured step reads on the device, one value each: other values need no other graph."""

    temperature: Tensor
    top_p: Tensor

    @classmethod
    def on(cls, device: torch.device) -> Settings:
        return cls(torch.ones(1, device=device), torch.ones(1, device=device))

    def set(self, options: GenerateOptions) -> None:
        if options.temperature > 0:
            self.temperature.fill_(options.temperature)
            self.top_p.fill_(options.top_p)


def chooser_key(options: GenerateOptions) -> tuple[bool, bool, int]:
    """What a captured graph is made for: drawn or not, cut by top-p or not, top-k."""
    return (True, options.top_p < 1.0, options.top_k) if options.temperature > 0 else (False, False, 0)


def make_chooser(options: GenerateOptions, settings: Settings) -> Chooser:
    drawn, cut, top_k = chooser_key(options)

    def best(logits: Tensor, ops: Ops) -> Choice:
        found = ops.entropy(logits)
        return Choice(found.argmax, found.entropy, found.confidence)

    def draw(logits: Tensor, ops: Ops) -> Choice:
        probabilities = shaped(logits, settings.temperature, settings.top_p if cut else None, top_k)
        # The largest of p / e with e ~ Exp(1) is a draw from p, and needs no host.
        noise = torch.empty_like(probabilities).exponential_()
        token, found = (probabilities / noise).argmax(dim=-1), ops.entropy(logits)
        picked, top = (logits.gather(1, i.unsqueeze(1)).squeeze(1).float() for i in (token, found.argmax))
        return Choice(token, found.entropy, found.confidence, picked - top)

    return draw if drawn else best


def shaped(logits: Tensor, temperature: Tensor, top_p: Tensor | None, top_k: int) -> Tensor:
    """Probabilities after temperature, top-k and top-p, in that order, as transformers applies them."""
    scores = logits.float() / temperature
    if top_k:
        least = scores.topk(min(top_k, scores.shape[-1]), dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < least, float("-inf"))
    if top_p is not None:
        ordered, index = scores.sort(dim=-1, descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
        ordered = ordered.masked_fill(before >= top_p, float("-inf"))
        scores = torch.empty_like(scores).scatter_(-1, index, ordered)
    return scores.softmax(dim=-1)
