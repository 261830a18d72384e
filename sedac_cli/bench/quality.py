"""What a gate does to quality, in the same run as its speed: perplexity, agreement, and lm-eval tasks where named.

found = evaluate_quality(loaded, plan, corpus, Quality(), seed=0)
found["measures"]["ppl_ratio"], found["intervals"]["ppl_ratio"]
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from sedac_cli.bench.matrix import Quality
from sedac_cli.corpus import Corpus
from sedac_cli.errors import InputError
from sedac_cli.models import LoadedModel
from sedac_cli.pipeline.evaluate import evaluate
from sedac_cli.runtime.plan import Plan


def evaluate_quality(
    loaded: LoadedModel, plan: Plan, corpus: Corpus | None, wanted: Quality, seed: int
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
    if wanted.tasks:
        found["tasks"] = task_scores(loaded, plan, wanted)
    return found or None


def task_scores(loaded: LoadedModel, plan: Plan, wanted: Quality) -> dict[str, Any]:
    """Per task, dense beside gated, by lm-evaluation-harness."""
    try:
        evaluation: Any = import_module("sedac_cli.pipeline.tasks")
    except ImportError as error:
        raise InputError(
            f"tasks {', '.join(wanted.tasks)}: not available here ({error})", hint="pip install 'sedac[eval]'"
        ) from None
    return evaluation.task_scores(loaded, plan, wanted.tasks, limit=wanted.task_limit)
