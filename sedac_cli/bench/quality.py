"""What a gate does to quality, in the same run as its speed: perplexity, agreement, and lm-eval tasks where named.

found = evaluate_quality(loaded, plan, corpus, Quality(), seed=0)
found["measures"]["ppl_ratio"], found["intervals"]["ppl_ratio"]
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

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
        found["tasks"] = task_scores(loaded, plan, wanted, seed)
    return found or None


def task_scores(loaded: LoadedModel, plan: Plan, wanted: Quality, seed: int) -> dict[str, Any]:
    """Per task and metric, dense beside gated, by lm-evaluation-harness."""
    try:
        run: Any = import_module("sedac_cli.harness.run")
        model: Any = import_module("sedac_cli.harness.model")
    except ImportError as error:
        raise InputError(
            f"tasks {', '.join(wanted.tasks)}: not available here ({error})", hint="pip install 'sedac[eval]'"
        ) from None
    folder = None if wanted.task_folder is None else Path(wanted.task_folder)
    lm = model.SedacLM(loaded.model, plan, tokenizer=loaded.tokenizer, batch_size=wanted.batch_size)
    report = run.evaluate_tasks(
        lm, wanted.tasks, run.EvalOptions(include_path=folder, limit=wanted.task_limit, seed=seed)
    )
    return {
        task.task: {name: {"dense": m.dense, "own": m.gated, "drop": m.drop} for name, m in task.metrics.items()}
        for task in report.tasks
    }


def quality_from_logprobs(dense: list[list[float]] | None, own: list[list[float]], seed: int) -> dict[str, Any]:
    """Perplexity from log-probabilities per sequence, beside dense's where there is one and it saw the same tokens."""
    base = own if dense is None else dense
    if [len(row) for row in base] != [len(row) for row in own]:
        raise InputError("dense and this configuration cut the same text into different tokens: not the same model")
    tokens = np.array([len(row) for row in own], dtype=np.float64)
    sums = {name: np.array([-sum(row) for row in rows]) for name, rows in (("nll_dense", base), ("nll_gated", own))}
    picks = np.random.default_rng(seed).integers(0, len(own), size=(1000, len(own)))

    def measures(rows: Any) -> dict[str, Any]:
        total = tokens[rows].sum(-1)
        a, b = (sums[name][rows].sum(-1) / total for name in ("nll_dense", "nll_gated"))
        found = {"ppl_gated": np.exp(b)}
        return found if dense is None else {"ppl_dense": np.exp(a), **found, "ppl_ratio": np.exp(b - a)}

    drawn = measures(picks)
    return {
        "measures": {name: float(value) for name, value in measures(np.arange(len(own))).items()},
        "intervals": {name: [float(x) for x in np.quantile(values, [0.025, 0.975])] for name, values in drawn.items()},
        "sequences": len(own),
        "predicted_tokens": int(tokens.sum()),
        "per_sequence": {"tokens": tokens.tolist(), **{name: values.tolist() for name, values in sums.items()}},
    }
