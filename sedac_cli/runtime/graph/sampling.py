"""The next token, chosen on the device: the best one, or one drawn with temperature, top-k and top-p.

settings = Settings.on(device)
choose = make_chooser(options, settings, penalised=False)
settings.set(options)
choice = choose(logits, ops)         # the tokens, and what is known of them

Entropy and log-probability are of the model's own distribution, before temperature and cuts; a penalty of repetitions that its
generation settings hold is part of it, as it is for the eager engine.
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


@dataclass
class Settings:
    """What a captured step reads on the device, one value each: other values need no other graph."""

    temperature: Tensor
    top_p: Tensor
    penalty: Tensor
    seen: Tensor | None = None
    """[rows, vocabulary + 1]: the tokens of each sequence so far, where a penalty asks for them; the last is for ids without logits."""

    @classmethod
    def on(cls, device: torch.device) -> Settings:
        return cls(*(torch.ones(1, dtype=torch.float32, device=device) for _ in range(3)))

    def set(self, options: GenerateOptions, penalty: float = 1.0) -> None:
        if options.temperature > 0:
            self.temperature.fill_(options.temperature)
            self.top_p.fill_(options.top_p)
        self.penalty.fill_(penalty)

    def remember(self, rows: int, vocab: int) -> None:
        """Room for what a penalty asks for; graphs keep its address, so it stays."""
        if self.seen is None:
            self.seen = torch.zeros(rows, vocab + 1, dtype=torch.bool, device=self.penalty.device)

    def begin(self, ids: Tensor, mask: Tensor) -> None:
        """What new sequences begin with: their prompts, padded on the left; the padding is none of them."""
        if self.seen is not None:
            self.seen.zero_()
            known = torch.where(mask.bool(), ids, ids[:, -1:]).clamp_max(self.seen.shape[1] - 1)
            self.seen[: ids.shape[0]].scatter_(1, known, True)


def chooser_key(options: GenerateOptions, penalised: bool) -> tuple[bool, bool, int, bool]:
    """What a captured graph is made for: drawn or not, cut by top-p or not, top-k, with a penalty or not."""
    return (
        (True, options.top_p < 1.0, options.top_k, penalised) if options.temperature else (False, False, 0, penalised)
    )


def make_chooser(options: GenerateOptions, settings: Settings, penalised: bool) -> Chooser:
    drawn, cut, top_k, _ = chooser_key(options, penalised)

    def draw(scores: Tensor) -> Tensor:
        probabilities = shaped(scores, settings.temperature, settings.top_p if cut else None, top_k)
        # The largest of p / e with e ~ Exp(1) is a draw from p, and needs no host.
        return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(dim=-1)

    def choose(logits: Tensor, ops: Ops) -> Choice:
        seen = settings.seen[: logits.shape[0]] if penalised and settings.seen is not None else None
        scores = logits if seen is None else repeated(logits, seen[:, :-1], settings.penalty)
        found = ops.entropy(scores)
        token = draw(scores) if drawn else found.argmax
        if seen is not None:
            seen.scatter_(1, token.unsqueeze(1), True)
        if not drawn:
            return Choice(token, found.entropy, found.confidence)
        picked, top = (scores.gather(1, i.unsqueeze(1)).squeeze(1).float() for i in (token, found.argmax))
        return Choice(token, found.entropy, found.confidence, picked - top)

    return choose


def repeated(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Float32 scores; those of tokens that were seen are made smaller, as transformers does it."""
    scores = logits.float()
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def shaped(logits: Tensor, temperature: Tensor, top_p: Tensor | None, top_k: int) -> Tensor:
    """Probabilities after temperature, top-k and top-p, in that order, as transformers applies them."""
    scores = logits.float() / temperature
    if top_k:
        least = scores.topk(min(top_k, scores.shape[-1]), dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < least, float("-inf"))
    if top_p is not None:
        ordered, index = scores.sort(dim=-1, descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
        ordered = ordered.masked_fill((before >= top_p) & (before > 0), float("-inf"))  # the best stays, whatever top-p
        scores = torch.empty_like(scores).scatter_(-1, index, ordered)
    return scores.softmax(dim=-1)
