"""Lossless modes in the `hf` backend: the loop of `runtime.speculate`, timed as the others are.

Dense, beside it, is Hugging Face's own `generate`, also where gates run in the graph engine; mode `loop` shows what the loop alone changes.
"""

from __future__ import annotations

import time

from sedac_cli.bench.machine import Meter
from sedac_cli.bench.matrix import Experiment
from sedac_cli.bench.metrics import Run, gaps
from sedac_cli.models import LoadedModel
from sedac_cli.runtime.generate import GenerateOptions
from sedac_cli.runtime.plan import Plan
from sedac_cli.runtime.speculate import SpeculateOptions, speculate


class DraftingSession:
    def __init__(self, loaded: LoadedModel, plan: Plan, experiment: Experiment):
        config = experiment.drafts
        self.loaded, self.plan = loaded, plan
        self.how = SpeculateOptions(
            experiment.how.draft, config.num_speculative_tokens, experiment.how.adaptive,
            config.prompt_lookup_max, config.prompt_lookup_min,
        )  # fmt: skip

    def run(self, prompts: list[str], new_tokens: int) -> Run:
        times: list[list[float]] = [[] for _ in prompts]

        def see(news: list[list[int]]) -> None:
            now = time.perf_counter()
            for row, tokens in zip(times, news, strict=True):
                row += [now] * len(tokens)

        options = GenerateOptions(max_new_tokens=new_tokens, ignore_eos=True)
        with Meter(self.loaded.device) as meter:
            made = speculate(self.loaded, self.plan, prompts, options, self.how, see)
        return Run(
            seconds=made.prefill_seconds + made.decode_seconds,  # what was measured afterwards for the break-even aside
            prompt_tokens=made.prompt_tokens,
            new_tokens=made.new_tokens,
            prefill_seconds=made.prefill_seconds,
            decode_seconds=made.decode_seconds,
            ttft=[made.prefill_seconds],
            itl=[gap for row in times for gap in gaps(row)],
            sequences=len(prompts),
            drafts={
                "proposed": made.proposed, "accepted": made.accepted, "verify_steps": made.verify_steps,
                "verify_tokens": made.verify_tokens, "draft_skip_ratio": made.draft_skip_ratio,
                "break_even_measured": made.break_even_measured, "break_even_flops": made.break_even_flops,
                "near_ties": made.near_ties, "identical": None, "sequences": len(prompts),
            },
            peak_bytes=meter.peak_bytes,
            joules=meter.joules,
            at_power_limit=meter.at_power_limit,
            tokens=[[token.token for token in row] for row in made.tokens],
        )  # fmt: skip

    def close(self) -> None:
        pass
