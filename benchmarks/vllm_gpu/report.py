"""Short tables from the document: medians with their range, and ratios to the engine that stands beside them."""

from __future__ import annotations

import statistics
from typing import Any

HIDE = {"per_sequence", "prometheus", "intervals", "hf", "vllm"}


def table(part: str, found: dict[str, Any]) -> list[str]:
    lines = [f"== {part}"]
    if "error" in found:
        lines.append(f"  FAILED: {found['error'].splitlines()[0]}")
    rows = found["rows"]
    if part == "throughput":
        return lines + timed(rows, "tokens_per_second", lambda r: "plain", higher=True)
    if part == "decide":
        return lines + timed(rows, "ms", beside)
    plain = {row.get("runner"): row["engine"] for row in rows if str(row.get("engine")).startswith("plain")}
    lines += timed(rows, "ms", lambda row: plain.get(row.get("runner"), ""))
    for row in rows:
        if "ms" not in row and "clocks" not in row:
            lines.append("  " + ", ".join(f"{k} {short(v)}" for k, v in row.items() if k not in HIDE))
            for key in ("vllm", "hf"):
                if key in row:
                    lines.append(f"    {key}: " + ", ".join(f"{k} {short(v)}" for k, v in row[key].items()))
    return lines


def short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return text if len(text) < 80 else text[:77] + "..."


def beside(row: dict[str, Any]) -> str:
    """Forced flags of the same way and set are what a deciding gate is compared with; those with plain vLLM."""
    way = row.get("way")
    return "plain" if way is None or row["engine"] == way else way


def timed(rows: list[dict[str, Any]], value: str, against: Any, higher: bool = False) -> list[str]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if value in row:
            key = (row["batch"], row["engine"], row.get("share"), row.get("off"), row.get("runner"))
            groups.setdefault(key, []).append(row)
    lines = []
    for (batch, engine, share, off, runner), samples in groups.items():
        values = [row[value] for row in samples]
        middle = statistics.median(values)
        other = against(samples[0])
        base = next(
            (
                [row[value] for row in found]
                for (b, e, _, o, r), found in groups.items()
                if b == batch and e == other and r == runner and (o == off or other.startswith("plain"))
            ),
            None,
        )
        ratio = ""
        if base and engine != other:
            both = middle / statistics.median(base)
            ratio = f"  {both:.3f} x {other}" + ("" if higher else f" ({1 / both:.2f}x as fast)")
        inside = [row["graph_ms"] for row in samples if row.get("graph_ms")]
        graph = f"  graph {statistics.median(inside):.3f}" if inside else ""
        what = str(engine) + ("" if share is None else f" {share:.0%} off") + ("" if not off else f" off {off}"[:24])
        wrong = "" if all(row.get("same_decisions", True) for row in samples) else "  DECISIONS DIFFER"
        lines.append(
            f"  batch {batch:4d}  {what:34s} {middle:10.3f} [{min(values):.3f} .. {max(values):.3f}]{graph}{ratio}{wrong}"
        )
    return lines
