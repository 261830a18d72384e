"""Lossless decoding: something cheap drafts tokens, the full model judges them all in one pass, what stands is emitted.

Always true: greedy output is the full model's own, sampled output has its distribution. A gate changes the states that
deeper layers make their keys and values from, so everything a draft wrote into the cache is taken back before the full
model runs over those positions; nothing a skip has touched is ever read by a verified token.

    result = speculate(loaded, make_plan("always:14", loaded.decoder), ["The sea was"], GenerateOptions(max_new_tokens=32))
    result.texts[0], result.acceptance_rate, result.token_recovery_rate

A verify pass handles several tokens at once where dense decoding handles one. Sums are then taken in another order, so
logits differ in their last bits: `near_ties` counts the emitted tokens where that could have chosen.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from sedac_cli.costs import model_costs
from sedac_cli.errors import InputError
from sedac_cli.models import LoadedModel
from sedac_cli.runtime.drafts import SUFFIX_LONGEST, DraftLength, NgramLookup
from sedac_cli.runtime.generate import (
    Generated,
    GenerateOptions,
    TokenDecision,
    check_room,
    encode_prompts,
    end_tokens,
)
from sedac_cli.runtime.plan import Plan
from sedac_cli.runtime.rejection import accept_greedy, accept_sampled, draw
from sedac_cli.runtime.skip import SkipRun, skipping
from sedac_cli.runtime.steps import Steps
from sedac_cli.runtime.warp import Warp

log = logging.getLogger("sedac")

DraftSource = Literal["gate", "ngram", "suffix", "ngram_gate", "suffix_gate"]
COST_EVERY = 64
"""Gated passes between two looks at what they skip; a look waits for the device."""
OnTokens = Callable[[list[list[int]]], None]


@dataclass(frozen=True)
class SpeculateOptions:
    """`draft` None: no drafts, the loop alone. `draft_tokens` is the upper end where it adapts."""

    draft: DraftSource | None = "gate"
    draft_tokens: int = 4
    adaptive: bool = False
    lookup_longest: int = 4
    lookup_shortest: int = 2


@dataclass(frozen=True, kw_only=True)
class Speculated(Generated):
    """`skip_ratio` is 0: every emitted token was computed whole. What the drafts skipped is `draft_skip_ratio`."""

    proposed: int
    accepted: int
    verify_steps: int
    """Counted per sequence: a step over a batch of 3 is 3."""
    verify_tokens: int
    draft_skip_ratio: float
    near_ties: int
    drafted: list[list[bool]]
    break_even_measured: float | None
    break_even_flops: float | None

    @property
    def acceptance_rate(self) -> float | None:
        return self.accepted / self.proposed if self.proposed else None

    @property
    def token_recovery_rate(self) -> float | None:
        """Share of the tokens of verify steps that the verifier did not have to produce itself."""
        return self.accepted / self.verify_tokens if self.verify_tokens else None


@torch.inference_mode()
def speculate(
    loaded: LoadedModel,
    plan: Plan,
    prompts: list[str],
    options: GenerateOptions,
    how: SpeculateOptions | None = None,
    on_tokens: OnTokens | None = None,
) -> Speculated:
    how = how or SpeculateOptions()
    inputs = encode_prompts(loaded, prompts, options)
    check_room(loaded, inputs["input_ids"].shape[1], options.max_new_tokens)
    if len(prompts) > 1 and (reason := Steps.no_batches(loaded)):
        raise InputError(f"drafts for a batch: {reason}", hint="one prompt at a time")
    with skipping(loaded.model, plan.gate, plan.standin, decoder=loaded.decoder) as run:
        run.paused = True
        loop = _Loop(loaded, plan, run, inputs, options, how, on_tokens)
    return loop.result()


@dataclass
class _Draft:
    """For one row. `q[i]`: the distribution token i was drawn from; None, where it was copied. `length`: who chose how many."""

    tokens: list[int] = field(default_factory=list)
    q: list[Tensor | None] = field(default_factory=list)
    length: DraftLength | None = None


class _Loop:
    """One call of `speculate`. `texts[b]`: all tokens of row b so far, the prompt's first; the last one is not in the cache."""

    def __init__(
        self, loaded: LoadedModel, plan: Plan, run: SkipRun, inputs: dict[str, Tensor], options: GenerateOptions,
        how: SpeculateOptions, on_tokens: OnTokens | None,
    ):  # fmt: skip
        self.loaded, self.plan, self.run, self.options, self.how, self.on_tokens = (
            loaded,
            plan,
            run,
            options,
            how,
            on_tokens,
        )
        self.warp = Warp(loaded, options)
        self.ends = end_tokens(loaded, options)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        self.batch = ids.shape[0]
        self.generator = torch.Generator(device=ids.device).manual_seed(options.seed)
        self.texts = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
        self.prompts = [len(text) for text in self.texts]
        self.drafted: list[list[bool]] = [[] for _ in self.texts]
        self.open = [True] * self.batch
        self.proposed = self.accepted = self.verify_steps = self.verify_tokens = self.near_ties = self.gate_passes = 0
        self.from_gate = 0
        longest = SUFFIX_LONGEST if (how.draft or "").startswith("suffix") else how.lookup_longest
        self.lookup = NgramLookup(longest, how.lookup_shortest) if how.draft and how.draft != "gate" else None
        self.gated = bool(how.draft) and str(how.draft).endswith("gate")
        self.gate_length = DraftLength(how.draft_tokens, how.adaptive, 0.0)
        self.lookup_length = DraftLength(how.draft_tokens, how.adaptive, 0.0)

        self.steps = Steps(loaded)
        began = time.perf_counter()
        logits = self.steps.prefill(ids, mask)
        self._emit([[self._judge(b, logits[b], _Draft())[1]] for b in range(self.batch)], [0] * self.batch)
        self.prefill_seconds = time.perf_counter() - began
        began = time.perf_counter()
        while any(self.open):
            self._step()
        self.decode_seconds = time.perf_counter() - began

    def _step(self) -> None:
        """Draft, verify, take back what did not stand."""
        drafts = self._drafts()
        width = max(len(draft.tokens) for draft in drafts) + 1
        pairs = zip(self.texts, drafts, strict=True)
        rows = [[text[-1], *draft.tokens, *[0] * (width - 1 - len(draft.tokens))] for text, draft in pairs]
        logits = self.steps.forward(rows)
        kept, chosen = (
            [-1] * self.batch,
            [[0]] * self.batch,
        )  # of a row that has ended nothing is kept, not even its last
        for b, draft in enumerate(drafts):
            if self.open[b]:
                kept[b], token = self._judge(b, logits[b], draft)
                chosen[b] = [*draft.tokens[: kept[b]], token]
                self._count(draft, kept[b])
        self.steps.keep([1 + count for count in kept])
        self._emit(chosen, kept)

    def _room(self, b: int) -> int:
        """Drafts that can still be used: a verify pass emits one token of its own."""
        made = len(self.texts[b]) - self.prompts[b]
        return self.options.max_new_tokens - made - 1 if self.open[b] else 0

    def _drafts(self) -> list[_Draft]:
        drafts = [_Draft() for _ in self.texts]
        if self.lookup is not None:
            count = self.lookup_length.choose()
            for b, text in enumerate(self.texts):
                if room := self._room(b):
                    tokens = self.lookup.propose(text, min(room, count))
                    drafts[b] = _Draft(tokens, [None] * len(tokens), self.lookup_length)
        wanting = [b for b, draft in enumerate(drafts) if self._room(b) and not draft.tokens]
        if self.gated and wanting and (count := self.gate_length.choose()):
            self._gated_drafts(drafts, wanting, count)
        return drafts

    def _gated_drafts(self, drafts: list[_Draft], wanting: list[int], count: int) -> None:
        """Up to `count` tokens after the last of each row in `wanting`; the cache is as it was afterwards."""
        count = min(count, max(map(self._room, wanting)))
        texts = [list(text) for text in self.texts]
        for b in wanting:
            drafts[b] = _Draft([], [], self.gate_length)
        self.run.paused = False
        for _ in range(count):
            logits = self.steps.forward([[text[-1]] for text in texts])
            for b in wanting:
                chances = self._chances(logits[b, -1:], [texts[b]])[0]
                token = int(chances.argmax()) if self.warp.greedy else draw(chances, self.generator)
                texts[b].append(token)
                if len(drafts[b].tokens) < self._room(b):
                    drafts[b].tokens.append(token)
                    drafts[b].q.append(chances)
        self.run.paused = True
        self.steps.undo(count)
        self.gate_passes += count
        if self.gate_passes == count or self.gate_passes % COST_EVERY < count:
            self.gate_length.cost = self._draft_cost()

    def _chances(self, logits: Tensor, texts: list[list[int]]) -> Tensor:
        """Scores to take the best of, or distributions to draw from."""
        scores = self.warp(logits, texts)
        return scores if self.warp.greedy else scores.softmax(-1)

    def _judge(self, b: int, logits: Tensor, draft: _Draft) -> tuple[int, int]:
        texts = [self.texts[b] + draft.tokens[:i] for i in range(len(draft.tokens) + 1)]
        p = self._chances(logits[: len(texts)], texts)
        if not self.warp.greedy:
            return accept_sampled(p, draft.q, draft.tokens, self.generator)
        kept, token = accept_greedy(p.argmax(-1).tolist(), draft.tokens)
        self.near_ties += _near_ties(p[: kept + 1], logits.dtype)
        return kept, token

    def _count(self, draft: _Draft, kept: int) -> None:
        self.verify_steps += 1
        self.proposed += len(draft.tokens)
        if draft.length is self.gate_length:
            self.from_gate += len(draft.tokens)
        if draft.tokens and draft.length is not None:
            draft.length.learn(kept, len(draft.tokens))

    def _emit(self, tokens: list[list[int]], kept: list[int]) -> None:
        """Add to each open row, up to its end; the first call is the prompt's pass, which verifies nothing."""
        first = not self.drafted[0]
        news: list[list[int]] = [[] for _ in tokens]
        for b, row in enumerate(tokens):
            if not self.open[b]:
                continue
            left = self.options.max_new_tokens - (len(self.texts[b]) - self.prompts[b])
            end = next((i for i, token in enumerate(row) if token in self.ends), len(row) - 1) + 1
            news[b] = row[: min(left, end)]
            self.texts[b] += news[b]
            marks = [i < kept[b] for i in range(len(news[b]))]
            self.drafted[b] += marks
            if not first:
                self.accepted += sum(marks)
                self.verify_tokens += len(marks)
            self.open[b] = (
                news[b][-1] not in self.ends and len(self.texts[b]) - self.prompts[b] < self.options.max_new_tokens
            )
        if self.on_tokens:
            self.on_tokens(news)

    def _draft_cost(self) -> float:
        """Of a draft pass, as a share of a dense one, by FLOPs; what it skipped is what was counted so far."""
        decoder, plan = self.loaded.decoder, self.plan
        tokens = max(1, self.run.tokens)
        rates = [count / tokens for count in self.run.skipped_per_layer]
        standin = [plan.standin.cost_per_token(layer) for layer in range(decoder.num_layers)]
        saved = model_costs(decoder, max(map(len, self.texts))).saved(
            rates, plan.gate.cost_per_token(decoder.hidden_size), standin
        )
        return 1 - saved

    def _break_even(self) -> tuple[float | None, float | None]:
        """The acceptance rate at which all this takes as long as dense steps of one token: by this machine's clock, and by
        FLOPs where a verify pass, bound by reading weights, costs one step."""
        if not self.proposed:
            return None, None
        flops = self.from_gate / self.proposed * (self._draft_cost() if self.from_gate else 0.0)
        dense = self.steps.dense_step_seconds([text[-1] for text in self.texts])
        measured = (self.decode_seconds * self.batch / dense - self.verify_steps) / self.proposed
        return max(0.0, measured), flops

    def result(self) -> Speculated:
        measured, flops = self._break_even()
        layers, tokenizer = self.loaded.decoder.num_layers, self.loaded.tokenizer
        rows = [text[prompt:] for text, prompt in zip(self.texts, self.prompts, strict=True)]
        count = sum(map(len, rows))
        after = count - len(rows)
        return Speculated(
            texts=[tokenizer.decode(row, skip_special_tokens=True) for row in rows],
            tokens=[[TokenDecision(tokenizer.decode([token]), token, 0, layers) for token in row] for row in rows],
            prompt_tokens=sum(self.prompts),
            new_tokens=count,
            prefill_seconds=self.prefill_seconds,
            decode_seconds=self.decode_seconds,
            tokens_per_second=count / (self.prefill_seconds + self.decode_seconds),
            decode_tokens_per_second=after / self.decode_seconds if after else 0.0,
            skip_ratio=0.0,
            skip_ratio_decode=0.0,
            average_exit_layer=float(layers),
            num_layers=layers,
            skip_ratios=[0.0] * len(rows),
            proposed=self.proposed,
            accepted=self.accepted,
            verify_steps=self.verify_steps,
            verify_tokens=self.verify_tokens,
            draft_skip_ratio=self.run.skip_ratio,
            near_ties=self.near_ties,
            drafted=self.drafted,
            break_even_measured=measured,
            break_even_flops=flops,
        )


def _near_ties(scores: Tensor, dtype: torch.dtype) -> int:
    """Rows whose best two scores are within a few roundings of each other."""
    if scores.shape[-1] < 2:
        return 0
    top = scores.topk(2, dim=-1).values
    margin = 4 * torch.finfo(dtype).eps * top[:, 0].abs().clamp_min(1.0)
    return int((top[:, 0] - top[:, 1] <= margin).sum())
