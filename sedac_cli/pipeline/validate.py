"""Measure what a gate costs and saves on text it was not calibrated on: simulation and reality side by side.

report = validate(loaded, gate, text, ValidateOptions(), data=CollectedData.open(folder))
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sedac_cli.artifacts.files import plain, write_json
from sedac_cli.artifacts.manifest import ModelIdentity, versions
from sedac_cli.config import TextSpec
from sedac_cli.corpus import Corpus
from sedac_cli.costs import Costs, model_costs
from sedac_cli.errors import InputError
from sedac_cli.gates.base import Gate
from sedac_cli.gates.deep import DeepThinking
from sedac_cli.gates.span import SpanGate
from sedac_cli.models import LoadedModel
from sedac_cli.pipeline import Progress, quiet_progress
from sedac_cli.pipeline.data import CollectedData
from sedac_cli.pipeline.evaluate import Array, Evaluation, evaluate
from sedac_cli.pipeline.simulate import Outcome, simulate_collected
from sedac_cli.standins import StandIn, ZeroStandIn

SHINGLE = 16
MAX_OVERLAP = 0.02


@dataclass(frozen=True)
class ValidateOptions:
    batch_size: int = 8
    seed: int = 0
    allow_overlap: bool = False
    deep: DeepThinking | None = None


@dataclass(frozen=True)
class Decisions:
    """One way of finding out what the gate does: per layer the share of tokens whose MLP was skipped, and the totals."""

    tokens: int
    skip_rates: list[float]
    exit_rates: list[float]
    exited_entropy: list[float | None]
    mlp_skip_ratio: float
    average_exit_layer: float
    compute_saved: float
    theoretical_speedup: float


@dataclass(frozen=True)
class ValidateReport:
    model: ModelIdentity
    gate: str
    parameters: dict[str, Any]
    text: dict[str, Any]
    sequences: int
    predicted_tokens: int
    measures: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    reality: Decisions
    simulation: Decisions
    simulation_collected: Decisions | None
    bins: dict[str, list[dict[str, Any]]]
    seconds_dense: float
    seconds_gated: float
    adaptive: list[dict[str, Any]] | None = None
    """Adaptive thresholds: what each checkpoint came to."""
    deep: dict[str, Any] | None = None
    """Deep thinking: its settings, tokens run again, and forward passes per token. What they cost is in every figure."""


def validate(
    loaded: LoadedModel,
    gate: Gate,
    text: TextSpec,
    options: ValidateOptions,
    data: CollectedData | None = None,
    standin: StandIn | None = None,
    progress: Progress = quiet_progress,
) -> tuple[ValidateReport, Evaluation]:
    corpus = Corpus(text, loaded.tokenizer)
    if data is not None:
        data.manifest.model.require_same(loaded.identity, str(data.folder))
        if not options.allow_overlap:
            refuse_overlap(corpus, data)
    evaluation = evaluate(loaded, gate, corpus, options.batch_size, standin, progress, options.deep)
    costs = model_costs(loaded.decoder, int(evaluation.context))
    if isinstance(gate, SpanGate):
        costs = costs.whole(gate.layers)
    entropy = _entropy_by_exit(evaluation)
    collected = None
    if data is not None and all(layer in data.layers for layer in range(gate.num_layers) if gate.reads(layer)):
        outcome = simulate_collected(gate, data, options.batch_size)
        collected = decisions(
            outcome, gate, standin, costs, loaded.decoder.hidden_size, _collected_entropy(outcome, data)
        )
    assert evaluation.simulated is not None
    size = loaded.decoder.hidden_size
    report = ValidateReport(
        model=loaded.identity,
        gate=gate.name,
        parameters=gate.parameters(),
        text=corpus.describe(),
        sequences=len(evaluation.per_sequence()["tokens"]),
        predicted_tokens=evaluation.predicted,
        measures=evaluation.measures(),
        intervals=evaluation.intervals(options.seed),
        reality=decisions(evaluation.real, gate, standin, costs, size, entropy),
        simulation=decisions(evaluation.simulated, gate, standin, costs, size, {}),
        simulation_collected=collected,
        bins={"target frequency": frequency_bins(evaluation), "dense entropy": entropy_bins(evaluation)},
        seconds_dense=evaluation.seconds_dense,
        seconds_gated=evaluation.seconds_gated,
        adaptive=None if (adaptive := getattr(gate, "adaptive", None)) is None else adaptive.report(),
        deep=None
        if options.deep is None
        else asdict(options.deep) | {"tokens": evaluation.thought, "passes": evaluation.real.passes},
    )
    return report, evaluation


def decisions(
    outcome: Outcome, gate: Gate, standin: StandIn | None, costs: Costs, hidden_size: int, entropy: dict[int, float]
) -> Decisions:
    """Totals of an outcome. The theoretical speed-up is a ratio of FLOPs, not a clock's word."""
    layers = gate.num_layers
    rates = outcome.skip_rates
    reached = [(outcome.exit_layer >= layer).sum().clamp_min(1) for layer in range(layers)]
    exits = [float((outcome.exit_layer == layer).sum() / reached[layer]) for layer in range(layers)]
    instead = standin or ZeroStandIn()
    # Of one pass: a token that is run again pays for everything again.
    per_pass = [1 - (1 - rate) / outcome.passes for rate in rates]
    saved = costs.saved(
        per_pass, gate.cost_per_token(hidden_size), [instead.cost_per_token(layer) for layer in range(layers)]
    )
    saved = 1 - outcome.passes * (1 - saved)
    return Decisions(
        tokens=outcome.tokens,
        skip_rates=rates,
        exit_rates=exits,
        exited_entropy=[entropy.get(layer) for layer in range(layers)],
        mlp_skip_ratio=sum(rates) / layers,
        average_exit_layer=float(outcome.exit_layer.double().mean()),
        compute_saved=saved,
        theoretical_speedup=1 / (1 - saved),
    )


def _entropy_by_exit(evaluation: Evaluation) -> dict[int, float]:
    """Mean dense entropy (bits) of the tokens that left at each layer."""
    exits, entropy = evaluation.columns["exit_layer"], evaluation.columns["entropy"]
    return {int(layer): float(entropy[exits == layer].mean()) for layer in np.unique(exits)}


def _collected_entropy(outcome: Outcome, data: CollectedData) -> dict[int, float]:
    exits = outcome.exit_layer
    return {x: float(data.labels[x][exits == x].mean()) for x in data.layers if bool((exits == x).any())}


def frequency_bins(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Thirds of the predicted tokens by how often their target occurs in this text."""
    counts = np.bincount(evaluation.columns["target"])[evaluation.columns["target"]]
    return _bins(evaluation, counts, (1 / 3, 2 / 3), "occurs {:.0f}..{:.0f} times")


def entropy_bins(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Quarters of the predicted tokens by how unsure the dense model is."""
    return _bins(evaluation, evaluation.columns["entropy"], (0.25, 0.5, 0.75), "{:.2f}..{:.2f} bits")


def _bins(evaluation: Evaluation, value: Array, edges: tuple[float, ...], form: str) -> list[dict[str, Any]]:
    cuts = np.quantile(value, edges)
    part = np.searchsorted(cuts, value, side="left")
    rows = []
    for index in range(len(edges) + 1):
        inside = part == index
        if inside.any():
            label = form.format(value[inside].min(), value[inside].max())
            rows.append({"bin": label, "tokens": int(inside.sum()), **evaluation.measures(inside)})
    return rows


def refuse_overlap(corpus: Corpus, data: CollectedData) -> None:
    """The text a promise is checked on must not be the text it was calibrated on."""
    ids, sequences = data.token_ids.numpy(), data.sequence_ids.numpy()
    borders = np.flatnonzero(np.diff(sequences)) + 1
    short = [sample for sample in np.split(ids, borders) if len(sample) < SHINGLE]
    refuse_shared(corpus.samples(), [ids, *short], str(data.folder))


def refuse_shared(samples: Iterable[Sequence[int]], known: Iterable[Sequence[int] | Array], where: str) -> None:
    """Refuse samples that share runs of SHINGLE tokens with the known ones."""
    old = np.unique(np.concatenate([_shingles(np.asarray(ids).astype(np.uint64)) for ids in known]))
    shingles = np.concatenate([_shingles(np.array(sample, dtype=np.uint64))[::SHINGLE] for sample in samples])
    share = float(np.isin(shingles, old).mean()) if len(shingles) else 0.0
    if share > MAX_OVERLAP:
        raise InputError(
            f"{share:.0%} of this text is in the calibration text ({where}): the result would flatter the gate",
            hint="other text with --dataset or --split, or --allow-overlap if that is what you want",
        )


def _shingles(ids: Array) -> Array:
    """A hash of every run of SHINGLE tokens (wrap-around arithmetic); of a shorter sample, one of the whole."""
    width = min(SHINGLE, len(ids))
    windows = np.lib.stride_tricks.sliding_window_view(ids + np.uint64(1), width)
    powers = np.array([pow(0x9E3779B97F4A7C15, k, 2**64) for k in range(1, width + 1)], dtype=np.uint64)
    total = np.zeros(len(windows), dtype=np.uint64)
    for k in range(width):
        total += windows[:, k] * powers[k]
    return total


def write_validation(path: Path, report: ValidateReport, evaluation: Evaluation, promise: Any = None) -> dict[str, Any]:
    """`validate.json`: the report and, per sequence, the sums every figure can be computed from again; `promise`: what was
    certified beside what was found."""
    document = plain(report) | {"difference": differences(report)}
    if promise is not None:
        document["promise"] = plain(promise)
    raw = {name: [round(float(x), 6) for x in values] for name, values in evaluation.per_sequence().items()}
    write_json(path, {"schema_version": 1, "report": document, "per_sequence": raw, "versions": versions()})
    return document


def differences(report: ValidateReport) -> dict[str, float]:
    """Reality minus simulation on the same text: the price of believing a simulation."""
    return {
        "mlp_skip_ratio": report.reality.mlp_skip_ratio - report.simulation.mlp_skip_ratio,
        "average_exit_layer": report.reality.average_exit_layer - report.simulation.average_exit_layer,
        "compute_saved": report.reality.compute_saved - report.simulation.compute_saved,
    }
