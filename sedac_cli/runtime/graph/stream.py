"""The graph engine behind the contract of `runtime.stream.stream`: one sequence after the other, heard burst by burst.

One sequence, because what a graph does is the same for all of its rows: an MLP runs if *any* row needs it, one set of
sampling settings and one random state are captured. Alone, a row has its own settings, what it skips depends on nobody, and a
row that wants everything dense runs through a second engine without a gate. What was decided is read from the flags of every
step; steps that a burst makes after a row's end are made in vain and counted for nobody.

    run = GraphStream(loaded, plan, max_length=4096)
    counts = run([Row(tuple(prompt_ids), max_new_tokens=32)], on_token=lambda t: print(t.token, t.skipped) or True)
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sedac_cli.errors import InputError, ran_out
from sedac_cli.models import LoadedModel
from sedac_cli.runtime.generate import GenerateOptions, end_tokens
from sedac_cli.runtime.graph.describe import exit_layers
from sedac_cli.runtime.graph.engine import GraphEngine
from sedac_cli.runtime.graph.state import Burst
from sedac_cli.runtime.plan import Plan, make_plan
from sedac_cli.runtime.skip import Pass
from sedac_cli.runtime.stream import OnPrompt, OnToken, Row, RowCounts, StreamToken, check_rows

KEPT = 8
"""Captured graphs that are kept: greedy, drawn, cut by top-p, and one for each top-k, which is whatever clients send."""

LEAST = 256
"""Places of a cache below which nobody is served."""


class GraphStream:
    def __init__(self, loaded: LoadedModel, plan: Plan, max_length: int, **options: Any):
        """`options` are `GraphEngine`'s."""
        self.loaded, self.max_length = loaded, max_length
        options = {"own_sampling": False} | options
        self.gated = GraphEngine(loaded, plan, batch=1, max_length=max_length, **options)
        self.dense = self.gated
        if not plan.gate.trivial:
            never = make_plan("never", loaded.decoder)
            self.dense = GraphEngine(loaded, never, batch=1, max_length=max_length, **options)

    @classmethod
    def fitting(
        cls, loaded: LoadedModel, plan: Plan, max_length: int, shrink: bool = False, **options: Any
    ) -> GraphStream:
        """With its first graphs captured: what does not fit into memory fails now. `shrink`: then half the length is tried,
        and half of that."""
        while True:
            try:
                return cls(loaded, plan, max_length, **options).prepared()
            except Exception as error:
                if not (shrink and ran_out(error) and max_length >= 2 * LEAST):
                    raise
            max_length //= 2
            gc.collect()
            if loaded.device.type == "cuda":
                torch.cuda.empty_cache()

    def prepared(self) -> GraphStream:
        """Capture what greedy requests replay, so that the first of them need not wait for it."""
        ends, pad = tuple(sorted(end_tokens(self.loaded))), self.loaded.tokenizer.pad_token_id or 0
        for engine in {id(e): e for e in (self.gated, self.dense)}.values():
            engine.prepare(GenerateOptions(max_new_tokens=engine.burst + 1), ends, pad)
        return self

    def __call__(self, rows: Sequence[Row], on_token: OnToken, on_prompt: OnPrompt | None = None) -> list[RowCounts]:
        check_rows(self.loaded, rows)
        if any(row.top_logprobs for row in rows):
            raise InputError("the graph engine keeps no probabilities but that of the token it chose")
        return [self._one(index, row, on_token, on_prompt) for index, row in enumerate(rows)]

    def _one(self, index: int, row: Row, on_token: OnToken, on_prompt: OnPrompt | None) -> RowCounts:
        engine = self.dense if row.dense else self.gated
        while len(engine.graphs) > KEPT:
            del engine.graphs[next(iter(engine.graphs))]
        ends = () if row.ignore_eos else tuple(sorted(end_tokens(self.loaded)))
        heard = _Heard(self.loaded, index, row, ends, on_token, on_prompt)
        ids = torch.tensor([row.prompt], device=self.loaded.device)
        options = GenerateOptions(row.max_new_tokens, row.temperature, row.top_p, row.top_k, row.seed)
        engine.run(ids, torch.ones_like(ids), options, ends, self.loaded.tokenizer.pad_token_id or 0, listener=heard)
        return heard.counts


class _Heard:
    """Passes on one row's tokens, until it ends or nobody wants more."""

    def __init__(
        self, loaded: LoadedModel, index: int, row: Row, ends: tuple[int, ...], on_token: OnToken,
        on_prompt: OnPrompt | None,
    ):  # fmt: skip
        self.index, self.row, self.ends = index, row, ends
        self.on_token, self.on_prompt = on_token, on_prompt
        self.counts = RowCounts(loaded.decoder.num_layers, prompt_tokens=len(row.prompt))
        self.over = False

    def prompt(self, seen: Pass | None, token: Tensor, entropy: Tensor, logprob: Tensor) -> bool:
        layers = self.counts.num_layers
        skipped = seen.skipped[0].tolist() if seen else [0] * len(self.row.prompt)
        exits = seen.exit_layer[0].tolist() if seen else [layers] * len(self.row.prompt)
        self._count("prefill", skipped, exits)
        if self.on_prompt is not None:
            self.on_prompt(self.index, self.counts)
        self._tell(int(token[0]), skipped[-1], exits[-1], float(entropy[0]), float(logprob[0]))
        return self.over

    def burst(self, burst: Burst, ran: Tensor) -> bool:
        skipped, exits = (ran.shape[1] - ran.sum(dim=1)).tolist(), exit_layers(ran).tolist()
        told = (burst.tokens[:, 0].tolist(), skipped, exits, burst.entropy[:, 0].tolist(), burst.logprob[:, 0].tolist())
        for token, gone, left, entropy, logprob in zip(*told, strict=True):
            if self.over:
                break
            self._count("decode", [gone], [left])
            self._tell(token, gone, left, entropy, logprob)
        return self.over

    def _count(self, phase: str, skipped: list[int], exits: list[int]) -> None:
        counts = self.counts
        counts.processed[phase] += len(skipped)
        counts.skipped += sum(skipped)
        for layer in exits:
            if layer < counts.num_layers:
                counts.exits[layer] = counts.exits.get(layer, 0) + 1

    def _tell(self, token: int, skipped: int, exit_layer: int, entropy: float, logprob: float) -> None:
        counts = self.counts
        counts.new_tokens += 1
        counts.exit_layers += exit_layer
        finish = "stop" if token in self.ends else "length" if counts.new_tokens >= self.row.max_new_tokens else None
        told = StreamToken(self.index, token, skipped, exit_layer, entropy, logprob, (), finish)
        self.over = not self.on_token(told) or finish is not None
