"""The first thing a reader sees: what was promised, and whether it held.

verdict(run).headline        # "The promise held"
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sedac_cli.report.explain import bench_limits
from sedac_cli.report.sources import RunData

KEPT, BROKEN, NONE, UNCHECKED = "kept", "broken", "none", "unchecked"


@dataclass(frozen=True)
class Verdict:
    status: str
    headline: str
    sentences: list[str] = field(default_factory=list)


def verdict(run: RunData) -> Verdict:
    missed = [_miss(m) for m in (run.bench or {}).get("missed") or [] if isinstance(m, dict)]
    found = _promise(run)
    if missed:
        also = ["Limits of the benchmark that were missed: " + "; ".join(missed) + "."]
        return Verdict(BROKEN, "A limit was missed", [*found.sentences, *also])
    limits = bench_limits(run.bench) if run.bench else []
    if limits and run.bench and run.bench.get("complete") and not run.bench.get("crashed"):
        also = ["The benchmark kept its limits: " + "; ".join(limits) + "."]
        if run.thresholds is None and run.validation is None:
            return Verdict(KEPT, "The benchmark's limits held", also)
        return Verdict(found.status, found.headline, [*found.sentences, *also])
    return found


def _promise(run: RunData) -> Verdict:
    report = (run.validation or {}).get("report")
    check = report.get("promise") if isinstance(report, dict) else None
    if isinstance(check, dict):
        low, high = check["interval"]
        told = [
            f"Promised: {check['harm']}, with confidence {check['confidence']:g}: {check['promise']}.",
            f"Measured on other text: {check['measured']:.4f} (95 % interval {low:.4f} .. {high:.4f}) over "
            f"{check['sequences']:,} sequences.",
        ]
        if check["kept"]:
            return Verdict(KEPT, "The promise held", told)
        return Verdict(BROKEN, "The promise was broken", told)
    promise = None if run.thresholds is None else run.thresholds.promise
    if promise is not None and promise.kind == "certified":
        harm = f"{promise.target.get('measure')} {promise.target.get('limit')}"
        told = [f"Promised: {harm}, with confidence {promise.confidence:g}, certified on {promise.calibration_sequences:,} "
                "sequences. Nobody has measured it on other text yet."]  # fmt: skip
        return Verdict(UNCHECKED, "A promise, not checked yet", told)
    told = []
    if promise is not None:
        told.append("The thresholds were chosen for a share of tokens that exit. That says nothing about quality.")
    if report is not None:
        m, spans = report["measures"], report["intervals"]
        told.append(
            f"Measured on other text, with the skips in force: {m['skip_ratio']:.1%} of MLPs skipped, perplexity "
            f"{_times(m.get('ppl_ratio'))} dense (95 % interval {_times(spans['ppl_ratio'][0])} .. "
            f"{_times(spans['ppl_ratio'][1])}), the same first choice at {m['agreement']:.1%} of positions."
        )
        return Verdict(NONE, "No quality was promised; this is what was measured", told)
    if any((c.get("quality") or {}).get("measures") for c in run.configurations):
        told.append("This folder holds a benchmark without limits. What it measured, with the skips in force:")
        return Verdict(NONE, "No quality was promised; this is what was measured", told)
    if not told:
        told.append("This folder holds no thresholds and no validation: there is nothing that could have held.")
    return Verdict(UNCHECKED, "No quality was promised, and none was measured", told)


def _times(value: float | None) -> str:
    return "infinitely many times" if value is None else f"{value:.4f} x"


def _miss(miss: dict[str, Any]) -> str:
    found = miss.get("found")
    value = "not measured" if found is None else f"{found:.4f}"
    where = f" ({miss['where']})" if miss.get("where") else ""
    return f"{miss.get('configuration')}: {miss.get('what')} {value}, limit {miss.get('limit')}{where}"
