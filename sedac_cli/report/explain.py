"""What a reader who was not there needs to be told in words: what the gate does, what a benchmark's limits were.

gate_sentence("cascade")         # "Probes at a few layers guess ..."
"""

from __future__ import annotations

from typing import Any

GATES = {
    "never": "Nothing is skipped: the model as it is.",
    "always": "Every token skips every MLP from one layer on.",
    "random": "A coin decides for every token and layer: the control that any rule has to beat.",
    "fixed": "One probe reads a token's state at one layer and guesses what skipping would cost (its risk). Below a "
    "threshold the token skips every later MLP.",
    "cascade": "Small probes read a token's state at a few layers and guess what skipping would cost (its risk). At the "
    "first layer where the risk is below that layer's threshold the token skips every later MLP.",
    "soft": "Probes at a few layers add up confidence in a token; the more there is, the less of each later MLP is mixed "
    "in, and below a floor it is not run.",
    "stability": "A token whose state hardly turns over some layers in a row skips every later MLP.",
    "entropy": "At some layers the model's own guess of the next token is read off; how sure and how steady it is decides "
    "until the next such layer.",
    "learned": "A small router in each layer, trained with the model frozen, decides for every token whether that "
    "layer's MLP is run.",
}
LIMITS = {
    "min_ar": "acceptance of drafts at least",
    "min_trr": "tokens recovered by drafts at least",
    "max_ppl_ratio": "ppl ratio at most",
    "min_agreement": "agreement at least",
    "min_speedup": "speed-up at least",
}

APPLIES = {"min_ar": "ar", "min_trr": "trr", "max_ppl_ratio": "ppl_ratio", "min_agreement": "agreement"}
"""The figure in a configuration's summary that a limit is about."""


def gate_sentence(name: str | None) -> str:
    return GATES.get((name or "").partition(":")[0], "")


def bench_limits(bench: dict[str, Any]) -> list[str]:
    """The limits a benchmark was to keep, in words: those of all its configurations, then a configuration's own. One that
    applies to nothing that was measured is left out."""
    summaries = [c.get("summary") or {} for c in bench.get("configurations") or []]
    applies = {limit: any(s.get(key) is not None for s in summaries) for limit, key in APPLIES.items()}

    def told(limits: dict[str, Any] | None) -> list[str]:
        return [
            f"{LIMITS.get(k, k)} {v:g}" for k, v in (limits or {}).items() if v is not None and applies.get(k, True)
        ]

    matrix = bench.get("matrix") or {}
    own = [f"{x['name']}: {text}" for x in matrix.get("experiments") or [] for text in told(x.get("thresholds"))]
    return told(matrix.get("thresholds")) + own
