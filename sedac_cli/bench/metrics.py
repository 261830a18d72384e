"""Figures from raw samples: percentiles, paired speed-ups with their spread, bootstrap intervals.

paired([2.0, 2.1], [1.0, 1.1])      # how many times faster, pair by pair
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

DRAWS = 4000
LEVEL = 0.95
FEWEST = 5
"""Fewer samples have no such interval: even their extremes hold the median in fewer than 9 of 10 cases."""


@dataclass(frozen=True)
class Request:
    """One request to a server: when it was sent (seconds into the run), what it took, or why it failed."""

    sent: float
    prompt_tokens: int
    new_tokens: int
    ttft: float | None
    latency: float
    error: str | None = None


@dataclass(frozen=True)
class Run:
    """One timed generation: every figure of the report is computed from these."""

    seconds: float
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float | None
    """Until the first token of the batch; None where the backend cannot tell."""
    decode_seconds: float | None
    ttft: list[float]
    """One per request; a batch that starts together has one."""
    itl: list[float]
    """Between the tokens of a sequence. A draft that is accepted brings several tokens at once: the later ones are 0."""
    sequences: int = 1
    skipped_per_layer: list[int] | None = None
    decided_tokens: int = 0
    skip_ratio: float | None = None
    """Where the layers are told apart for some of the tokens only, or not at all."""
    floor_seconds: float | None = None
    """What the decode steps could not have been faster than (`bench.floor`); None where nobody knows."""
    drafts: dict[str, Any] | None = None
    peak_bytes: int | None = None
    joules: float | None = None
    at_power_limit: bool | None = None
    """Of the GPU, at the end; None where nobody can tell."""
    tokens: list[list[int]] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)

    @property
    def decode_tokens(self) -> int:
        return self.new_tokens - self.sequences

    @property
    def steps(self) -> float:
        """Decode steps of sequences of one length."""
        return self.decode_tokens / self.sequences


def gaps(times: Sequence[float]) -> list[float]:
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    if not len(values):
        return None
    found = np.percentile(np.asarray(values, dtype=np.float64), [50, 95, 99])
    return {name: float(x) for name, x in zip(("p50", "p95", "p99"), found, strict=True)}


def interval(values: Sequence[float], seed: int = 0, level: float = LEVEL) -> tuple[float, float]:
    """Bootstrap interval of the median."""
    array = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(array), size=(DRAWS, len(array)))
    low, high = np.quantile(np.median(array[picks], axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def spread(values: Sequence[float], seed: int = 0) -> dict[str, Any] | None:
    """Median, its interval (None of too few samples), and the extremes."""
    if not len(values):
        return None
    low, high = interval(values, seed) if len(values) >= FEWEST else (None, None)
    return {"median": float(np.median(values)), "low": low, "high": high, "min": float(min(values)),
            "max": float(max(values)), "n": len(values)}  # fmt: skip


def paired(dense: Sequence[float], own: Sequence[float], seed: int = 0) -> dict[str, Any] | None:
    """Dense time / own time, pair by pair; pairs run one after the other, so what the machine does meets both."""
    pairs = [a / b for a, b in zip(dense, own, strict=True) if a and b]
    return spread(pairs, seed)


def summarize(runs: Sequence[Run]) -> dict[str, Any]:
    """Absolute figures of one configuration in one cell."""
    decode = [run.decode_tokens / run.decode_seconds for run in runs if run.decode_seconds and run.decode_tokens > 0]
    prefill = [run.prompt_tokens / run.prefill_seconds for run in runs if run.prefill_seconds]
    joules = [run.joules / run.new_tokens for run in runs if run.joules is not None and run.new_tokens]
    peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    limited = [run.at_power_limit for run in runs if run.at_power_limit is not None]
    found: dict[str, Any] = {
        "tokens_per_second": spread([run.new_tokens / run.seconds for run in runs if run.seconds]),
        "decode_tokens_per_second": spread(decode),
        "prefill_tokens_per_second": spread(prefill),
        "ttft_seconds": percentiles([x for run in runs for x in run.ttft]),
        "itl_seconds": percentiles([x for run in runs for x in run.itl]),
        "peak_bytes": max(peaks) if peaks else None,
        "joules_per_token": spread(joules),
        "at_power_limit": {"runs": sum(limited), "of": len(limited)} if limited else None,
        "floor": floor(runs),
    }
    return found | skips(runs) | drafts(runs) | requests(runs)


def floor(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Seconds a decode step could not have been faster than, and which share of the time it took that is."""
    known = [(run.floor_seconds, run.decode_seconds, run) for run in runs if run.floor_seconds and run.decode_seconds]
    if not known:
        return None
    return {
        "step_seconds": float(np.median([least / run.steps for least, _, run in known])),
        "took_seconds": float(np.median([took / run.steps for _, took, run in known])),
        "share": spread([least / took for least, took, _ in known]),
    }


def skips(runs: Sequence[Run]) -> dict[str, Any]:
    counted = [run for run in runs if run.skipped_per_layer is not None and run.decided_tokens]
    if not counted:
        return {"skip_ratio": _mean([run.skip_ratio for run in runs]), "skip_ratio_per_layer": None}
    tokens = sum(run.decided_tokens for run in counted)
    layers = np.sum([run.skipped_per_layer for run in counted], axis=0) / tokens  # type: ignore[arg-type]
    whole = _mean([run.skip_ratio for run in counted])
    return {
        "skip_ratio": float(layers.mean()) if whole is None else whole,
        "skip_ratio_per_layer": [float(x) for x in layers],
    }


def drafts(runs: Sequence[Run]) -> dict[str, Any]:
    """AR = accepted / proposed. TRR = tokens of verify steps that the verifier did not produce itself / their tokens."""
    made = [run.drafts for run in runs if run.drafts]
    if not made:
        return {}
    total = {key: sum(d[key] for d in made) for key in ("proposed", "accepted", "verify_steps", "verify_tokens")}
    identical = [d["identical"] for d in made if d.get("identical") is not None]
    return {
        "drafts": total
        | {
            "ar": total["accepted"] / total["proposed"] if total["proposed"] else None,
            "trr": total["accepted"] / total["verify_tokens"] if total["verify_tokens"] else None,
            "tokens_per_step": total["verify_tokens"] / total["verify_steps"] if total["verify_steps"] else None,
            "break_even_measured": _mean([d["break_even_measured"] for d in made]),
            "break_even_flops": _mean([d["break_even_flops"] for d in made]),
            "near_ties": sum(d["near_ties"] for d in made),
            "identical": sum(identical) if identical else None,
            "compared": sum(d["sequences"] for d in made if d.get("identical") is not None),
        }
    }


def requests(runs: Sequence[Run]) -> dict[str, Any]:
    every = [request for run in runs for request in run.requests]
    if not every:
        return {}
    done = [request for request in every if request.error is None]
    errors: dict[str, int] = {}
    for request in every:
        if request.error is not None:
            errors[request.error] = errors.get(request.error, 0) + 1
    return {
        "requests": {"sent": len(every), "done": len(done), "failed": len(every) - len(done), "errors": errors},
        "latency_seconds": percentiles([request.latency for request in done]),
        "requests_per_second": spread([sum(r.error is None for r in run.requests) / run.seconds for run in runs]),
    }


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
