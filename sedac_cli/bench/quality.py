"""What a gate does to quality, in the same run as its speed: perplexity, agreement, and lm-eval tasks where named.

found = evaluate_quality(loaded, plan, corpus, Quality(), seed=0)
found["measures"]["ppl_ratio"], found["intervals"]["ppl_ratio"]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sedac_cli.bench.matrix import Quality
from sedac_cli.bench.tasks import Tasks
from sedac_cli.corpus import Corpus
from sedac_cli.errors import InputError
from sedac_cli.models import LoadedModel
from sedac_cli.pipeline.evaluate import evaluate
from sedac_cli.runtime.plan import Plan


def evaluate_quality(
    loaded: LoadedModel, plan: Plan, corpus: Corpus | None, wanted: Quality, seed: int, tasks: Tasks | None = None
) -> dict[str, Any] | None:
    found: dict[str, Any] = {}
    if corpus is not None:
        evaluation = evaluate(loaded, plan.gate, corpus, wanted.batch_size, plan.standin)
        measures = evaluation.measures()
        found = {
            "measures": measures,
            "intervals": evaluation.intervals(seed),
            "skip_rates": evaluation.real.skip_rates,
            "sequences": len(evaluation.per_sequence()["tokens"]),
            "predicted_tokens": evaluation.predicted,
            "per_sequence": {k: [round(float(x), 6) for x in v] for k, v in evaluation.per_sequence().items()},
            # Half as bad as a coin over the vocabulary is no trained model.
            "random_weights": measures["ppl_dense"] > loaded.decoder.vocab_size / 2,
        }
    if tasks is not None:
        found["tasks"] = tasks.scores(loaded, plan)
    return found or None


@dataclass(frozen=True)
class Scored:
    """A text as a model sees it, all tokens but the first: log-probability in nats, and what the model would have said."""

    logprobs: list[float]
    best: list[Any] | None = None
    """Token ids, or their text; None where they are not told."""


def quality_from_logprobs(dense: list[Scored] | None, own: list[Scored], seed: int) -> dict[str, Any]:
    """Perplexity, beside dense's where there is one and it saw the same tokens; agreement where both say what they would say."""
    base = own if dense is None else dense
    if [len(row.logprobs) for row in base] != [len(row.logprobs) for row in own]:
        raise InputError("dense and this configuration cut the same text into different tokens: not the same model")
    tokens = np.array([len(row.logprobs) for row in own], dtype=np.float64)
    sums = {
        name: np.array([-sum(row.logprobs) for row in rows]) for name, rows in (("nll_dense", base), ("nll_gated", own))
    }
    pairs = [(a.best, b.best) for a, b in zip(base, own, strict=True) if a.best is not None and b.best is not None]
    if dense is not None and len(pairs) == len(own):
        sums["agree"] = np.array([sum(x == y for x, y in zip(a, b, strict=True)) for a, b in pairs], dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(own), size=(1000, len(own)))

    def measures(rows: Any) -> dict[str, Any]:
        total = tokens[rows].sum(-1)
        a, b = (sums[name][rows].sum(-1) / total for name in ("nll_dense", "nll_gated"))
        if dense is None:
            return {"ppl_gated": np.exp(b)}
        found = {"ppl_dense": np.exp(a), "ppl_gated": np.exp(b), "ppl_ratio": np.exp(b - a)}
        return found | ({"agreement": sums["agree"][rows].sum(-1) / total} if "agree" in sums else {})

    drawn = measures(picks)
    return {
        "measures": {name: float(value) for name, value in measures(np.arange(len(own))).items()},
        "intervals": {name: [float(x) for x in np.quantile(values, [0.025, 0.975])] for name, values in drawn.items()},
        "sequences": len(own),
        "predicted_tokens": int(tokens.sum()),
        "per_sequence": {"tokens": tokens.tolist(), **{name: values.tolist() for name, values in sums.items()}},
    }
