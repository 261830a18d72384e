"""Generate token by token: each row of a batch has its own sampling, and is heard, and can be stopped, at every token.

Always true: it is the model's own `generate` that runs, with a gate in force; a greedy row gives the tokens that
`runtime.generate` gives, a sampled one those it gives to the same prompt alone under the same seed. Who shares the batch
does not matter. What a pass skipped is read from the pass, never derived.

    rows = [Row(tuple(prompt_ids), max_new_tokens=32)]
    counts = stream(loaded, plan, rows, on_token=lambda t: print(t.token, t.skipped) or True)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from sedac_cli.errors import InputError
from sedac_cli.gpu.reference import entropy_of_logits
from sedac_cli.models import LoadedModel
from sedac_cli.runtime.generate import end_tokens
from sedac_cli.runtime.plan import Plan
from sedac_cli.runtime.skip import Pass, SkipRun, skipping


@dataclass(frozen=True)
class Row:
    """One sequence to continue. `dense`: its tokens run every MLP, whatever the gate says."""

    prompt: tuple[int, ...]
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    ignore_eos: bool = False
    dense: bool = False
    top_logprobs: int = 0


@dataclass(frozen=True)
class StreamToken:
    """A token, what the pass that produced it skipped, and how sure the model was. `entropy` is in bits, `logprob` in
    nats; both are of the model's distribution before temperature and cuts. `finish`: this is the row's last token."""

    row: int
    token: int
    skipped: int
    exit_layer: int
    entropy: float
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    finish: str | None = None


@dataclass
class RowCounts:
    """What was computed for one row. A token counts where it goes *into* the model: the last one made never does."""

    num_layers: int
    prompt_tokens: int = 0
    new_tokens: int = 0
    processed: dict[str, int] = field(default_factory=lambda: {"prefill": 0, "decode": 0})
    skipped: int = 0
    exits: dict[int, int] = field(default_factory=dict)
    """Processed tokens by the first layer whose MLP they skipped; those that skipped none are not in it."""
    exit_layers: int = 0

    @property
    def skip_ratio(self) -> float:
        return self.skipped / max(1, sum(self.processed.values()) * self.num_layers)

    @property
    def average_exit_layer(self) -> float:
        """Over the tokens made; the number of layers where nothing was skipped."""
        return self.exit_layers / self.new_tokens if self.new_tokens else float(self.num_layers)


OnToken = Callable[[StreamToken], bool]
"""Called once per token and row, in order; False ends the row."""
OnPrompt = Callable[[int, RowCounts], None]
"""Called once per row, when its prompt has been read, before its first token."""


@torch.inference_mode()
def stream(
    loaded: LoadedModel, plan: Plan, rows: Sequence[Row], on_token: OnToken, on_prompt: OnPrompt | None = None
) -> list[RowCounts]:
    """Run the rows to their ends. An exception from a callback ends the batch and is passed on."""
    check_rows(loaded, rows)
    ids, mask = _left_padded(loaded, rows)
    counts = [RowCounts(loaded.decoder.num_layers, prompt_tokens=len(row.prompt)) for row in rows]
    listener = _Listener(loaded, rows, counts, on_token, on_prompt)
    forced = torch.tensor([row.dense for row in rows], device=loaded.device).unsqueeze(1)
    with skipping(
        loaded.model, plan.gate, plan.standin, decoder=loaded.decoder, on_pass=listener.passed
    ) as run:  # fmt: skip
        listener.run = run
        if bool(forced.any()):
            listener.forced, run.force = forced, forced.expand(ids.shape)
        loaded.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max(row.max_new_tokens for row in rows),
            do_sample=False, eos_token_id=None, pad_token_id=loaded.tokenizer.pad_token_id,
            logits_processor=LogitsProcessorList([_Sampler(rows, listener)]),
            stopping_criteria=StoppingCriteriaList([_Stop(listener)]),
        )  # fmt: skip
    return counts


def check_rows(loaded: LoadedModel, rows: Sequence[Row]) -> None:
    limit = context_limit(loaded)
    for row in rows:
        if not row.prompt:
            raise InputError("a prompt without a single token: there is nothing to continue")
        if limit and len(row.prompt) + row.max_new_tokens > limit:
            raise InputError(
                f"a prompt of {len(row.prompt)} tokens and {row.max_new_tokens} new ones exceed the model's {limit} positions"
            )


def context_limit(loaded: LoadedModel) -> int | None:
    """Positions the model knows, if it names a number."""
    return getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)


def _left_padded(loaded: LoadedModel, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    width = max(len(row.prompt) for row in rows)
    ids = torch.full((len(rows), width), loaded.tokenizer.pad_token_id or 0, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        ids[b, width - len(row.prompt) :] = torch.tensor(row.prompt)
        mask[b, width - len(row.prompt) :] = 1
    return ids.to(loaded.device), mask.to(loaded.device)


class _Listener:
    """What is known of the current step; joins the pass, the scores and the chosen tokens."""

    def __init__(
        self, loaded: LoadedModel, rows: Sequence[Row], counts: list[RowCounts], on_token: OnToken,
        on_prompt: OnPrompt | None,
    ):  # fmt: skip
        self.rows, self.counts = rows, counts
        self.on_token, self.on_prompt = on_token, on_prompt
        self.ends = end_tokens(loaded)
        self.done = [False] * len(rows)
        self.run: SkipRun | None = None
        self.forced: Tensor | None = None
        self.prompt_read = False
        self.skipped: list[int] = []
        self.exits: list[int] = []
        self.scores: Tensor | None = None

    def passed(self, done: Pass) -> None:
        if self.forced is not None and self.run is not None:
            self.run.force = self.forced  # from here on every pass is one token wide
        if not self.prompt_read:
            self.prompt_read = True
            for b in range(len(self.rows)):
                real = done.real[b]
                self._count(b, "prefill", done.skipped[b][real].tolist(), done.exit_layer[b][real].tolist())
                if self.on_prompt is not None:
                    self.on_prompt(b, self.counts[b])
        else:
            last = torch.stack([done.skipped[:, -1], done.exit_layer[:, -1]]).tolist()
            for b, (skipped, exit_layer) in enumerate(zip(*last, strict=True)):
                if not self.done[b]:
                    self._count(b, "decode", [skipped], [exit_layer])
        self.skipped, self.exits = torch.stack([done.skipped[:, -1], done.exit_layer[:, -1]]).tolist()

    def _count(self, b: int, phase: str, skipped: list[int], exits: list[int]) -> None:
        counts = self.counts[b]
        counts.processed[phase] += len(skipped)
        counts.skipped += sum(skipped)
        for layer in exits:
            if layer < counts.num_layers:
                counts.exits[layer] = counts.exits.get(layer, 0) + 1

    def chosen(self, tokens: list[int]) -> None:
        scores = self.scores
        assert scores is not None
        entropy, confidence, best = entropy_of_logits(scores)
        picked = torch.tensor(tokens, device=scores.device)
        log_z = scores.gather(1, best[:, None]).squeeze(1) - confidence.log()
        logprob = scores.gather(1, picked[:, None]).squeeze(1) - log_z
        facts = torch.stack([entropy, logprob]).tolist()
        for b, row in enumerate(self.rows):
            if self.done[b]:
                continue
            counts = self.counts[b]
            counts.new_tokens += 1
            counts.exit_layers += self.exits[b]
            finish = None
            if tokens[b] in self.ends and not row.ignore_eos:
                finish = "stop"
            elif counts.new_tokens >= row.max_new_tokens:
                finish = "length"
            top = _top(scores[b] - log_z[b], row.top_logprobs) if row.top_logprobs else ()
            heard = StreamToken(
                b, tokens[b], self.skipped[b], self.exits[b], facts[0][b], facts[1][b], top, finish
            )  # fmt: skip
            self.done[b] = not self.on_token(heard) or finish is not None


def _top(logprobs: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    found = logprobs.topk(min(count, logprobs.numel()))
    return tuple(zip(found.indices.tolist(), found.values.tolist(), strict=True))


class _Sampler(LogitsProcessor):
    """Draws for the rows that sample and leaves them one possible token; greedy rows are left to the model's argmax."""

    def __init__(self, rows: Sequence[Row], listener: _Listener):
        self.rows, self.listener = rows, listener
        self.warpers = [_warpers(row) for row in rows]
        self.generators: dict[int, torch.Generator] = {}

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.listener.scores = scores
        drawn = [b for b, row in enumerate(self.rows) if row.temperature > 0 and not self.listener.done[b]]
        if not drawn:
            return scores
        scores = scores.clone()
        for b in drawn:
            if b not in self.generators:
                self.generators[b] = torch.Generator(scores.device).manual_seed(self.rows[b].seed)
            shares = torch.softmax(self.warpers[b](input_ids[b : b + 1], scores[b : b + 1].clone()), dim=-1)
            token = torch.multinomial(shares, 1, generator=self.generators[b])
            scores[b] = -torch.inf
            scores[b, token.squeeze()] = 0.0
        return scores


def _warpers(row: Row) -> LogitsProcessorList:
    """In the order in which `generate` applies them."""
    found: list[Any] = []
    if row.temperature > 0:
        if row.temperature != 1.0:
            found.append(TemperatureLogitsWarper(row.temperature))
        if row.top_k:
            found.append(TopKLogitsWarper(top_k=row.top_k))
        if row.top_p < 1.0:
            found.append(TopPLogitsWarper(top_p=row.top_p))
    return LogitsProcessorList(found)


class _Stop(StoppingCriteria):
    def __init__(self, listener: _Listener):
        self.listener = listener

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.listener.chosen(input_ids[:, -1].tolist())
        return torch.tensor(self.listener.done, device=input_ids.device)
