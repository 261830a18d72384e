"""What changed between two runs of the same matrix, and whether it is more than noise.

Each figure is computed again from the raw samples of both runs, and its ratio after / before gets a bootstrap interval.
Speed-ups are paired within each run, so they can be compared across machines; absolute figures move with the machine.
Perplexity is compared sequence by sequence where both runs judged the same text.

    found = compare_documents(read_document(a), read_document(b))
    [c for c in found.changes if c.verdict == "worse"]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sedac_cli.bench.metrics import FEWEST
from sedac_cli.errors import InputError

DRAWS = 4000
MEASURED = ("busy_before", "read_bytes_per_second")
"""Parts of the description that are never twice the same."""
Array = np.ndarray[Any, Any]
Verdict = Literal["better", "worse", "noise", "too few samples"]


@dataclass(frozen=True)
class Change:
    configuration: str
    where: str
    figure: str
    before: float
    after: float
    ratio: float
    low: float | None
    high: float | None
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    random_weights: bool
    """Of either run: then only speed means anything."""
    environment: list[str]
    changes: list[Change]
    only_in_one: list[str]


def _rate(tokens: str, seconds: str) -> Callable[[dict[str, Any]], float | None]:
    def value(sample: dict[str, Any]) -> float | None:
        count = sample["new_tokens"] - sample["sequences"] if tokens == "decode" else sample[tokens]
        return count / sample[seconds] if sample[seconds] and count else None

    return value


def _draft(part: str, of: str) -> Callable[[dict[str, Any]], float | None]:
    def value(sample: dict[str, Any]) -> float | None:
        made = sample.get("drafts")
        return made[part] / made[of] if made and made[of] else None

    return value


def _energy(sample: dict[str, Any]) -> float | None:
    return sample["joules"] / sample["new_tokens"] if sample.get("joules") and sample["new_tokens"] else None


def _milliseconds(name: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda sample: 1e3 * float(np.median(sample[name])) if sample[name] else None


# Name, value of one run, whether more is better.
FIGURES: tuple[tuple[str, Callable[[dict[str, Any]], float | None], bool], ...] = (
    ("tokens/s", _rate("new_tokens", "seconds"), True),
    ("decode tokens/s", _rate("decode", "decode_seconds"), True),
    ("prefill tokens/s", _rate("prompt_tokens", "prefill_seconds"), True),
    ("TTFT, ms", _milliseconds("ttft"), False),
    ("ITL, ms", _milliseconds("itl"), False),
    ("AR", _draft("accepted", "proposed"), True),
    ("TRR", _draft("accepted", "verify_tokens"), True),
    ("peak memory, MiB", lambda sample: sample["peak_bytes"] and sample["peak_bytes"] / 2**20, False),
    ("J/token", _energy, False),
)
PARTS = (("speed-up", "seconds"), ("decode speed-up", "decode_seconds"), ("prefill speed-up", "prefill_seconds"))


def compare_documents(
    before: dict[str, Any], after: dict[str, Any], *, confidence: float = 0.99, min_change: float = 0.02, seed: int = 0
) -> Comparison:
    rng = np.random.default_rng(seed)
    mine = {c["name"]: c for c in before["configurations"]}
    theirs = {c["name"]: c for c in after["configurations"]}
    shared = [name for name in mine if name in theirs]
    if not shared:
        raise InputError(f"the runs have no configuration in common: {', '.join(mine)} and {', '.join(theirs)}")
    only = [f"only in the {side} run: {name}" for side, own, other in
            (("earlier", mine, theirs), ("later", theirs, mine)) for name in own if name not in other]  # fmt: skip
    changes: list[Change] = []
    for name in shared:
        cells, others = _by_work(mine[name]), _by_work(theirs[name])
        for work, cell in others.items():
            if work not in cells:
                only.append(f"only in the later run: {name}, {work}")
                continue
            engines = [_engine(found, run) for found, run in ((cells[work], mine[name]), (cell, theirs[name]))]
            if engines[0] != engines[1]:
                only.append(f"another engine: {name}, {work}: {engines[0]} before, {engines[1]} after")
            for figure, a, b, more in _samples(cells[work], cell):
                if np.median(a) == 0:
                    only.append(f"no ratio: {name}, {work}: {figure} was 0 and is {np.median(b):.4g}")
                    continue
                drawn = _ratio_of_medians(rng, a, b)
                changes.append(_change(name, work, figure, np.median(a), np.median(b), drawn, more, len(a), len(b),
                                       confidence, min_change))  # fmt: skip
        changes += _quality(rng, name, mine[name], theirs[name], confidence, min_change)
        changes += _tasks(rng, name, mine[name], theirs[name], confidence, min_change)
    random = any(bool(document.get("random_weights")) for document in (before, after))
    return Comparison(random, _environment(before, after), changes, only)


def _by_work(configuration: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Cells by their work. Only where one was measured in two engines, as dense may be, is the engine part of its name."""
    labels = [cell["label"] for cell in configuration["cells"]]
    return {
        cell["label"] if labels.count(cell["label"]) == 1 else f"{cell['label']}, {cell['engine']}": cell
        for cell in configuration["cells"]
    }


def _engine(cell: dict[str, Any], configuration: dict[str, Any]) -> str | None:
    """Files of earlier versions name it once for all cells."""
    found: str | None = cell.get("engine") or configuration.get("engine")
    return found


def _samples(before: dict[str, Any], after: dict[str, Any]) -> Iterator[tuple[str, Array, Array, bool]]:
    for figure, field in PARTS:
        a, b = (_pairs(cell["samples"], field) for cell in (before, after))
        if len(a) and len(b):
            yield figure, a, b, True
    for figure, value, more in FIGURES:
        found = [[value(sample) for sample in cell["samples"]["own"]] for cell in (before, after)]
        a, b = (np.array([x for x in row if x is not None], dtype=np.float64) for row in found)
        if len(a) and len(b):
            yield figure, a, b, more


def _pairs(samples: dict[str, Any], field: str) -> Array:
    pairs = zip(samples["dense"], samples["own"], strict=False)
    found = [
        _per_token(d, field) / _per_token(o, field)
        for d, o in pairs
        if d[field] and o[field] and d["new_tokens"] and o["new_tokens"]
    ]
    return np.array(found, dtype=np.float64)


def _per_token(sample: dict[str, Any], field: str) -> float:
    return sample[field] / sample["prompt_tokens" if field == "prefill_seconds" else "new_tokens"]


def _ratio_of_medians(rng: np.random.Generator, a: Array, b: Array) -> Array:
    def draw(x: Array) -> Array:
        return np.median(x[rng.integers(0, len(x), size=(DRAWS, len(x)))], axis=1)

    above, below = draw(b), draw(a)
    return above[below != 0] / below[below != 0]


def _change(
    name: str, where: str, figure: str, before: float, after: float, drawn: Array, more_is_better: bool, n: int, m: int,
    confidence: float, min_change: float,
) -> Change:  # fmt: skip
    ratio = float(after / before)
    if min(n, m) < FEWEST:
        return Change(name, where, figure, float(before), float(after), ratio, None, None, "too few samples")
    low, high = (float(x) for x in np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2]))
    verdict: Verdict = "noise"
    if (low > 1 or high < 1) and abs(ratio - 1) >= min_change:
        verdict = "better" if (ratio > 1) == more_is_better else "worse"
    return Change(name, where, figure, float(before), float(after), ratio, low, high, verdict)


def _quality(
    rng: np.random.Generator,
    name: str,
    before: dict[str, Any],
    after: dict[str, Any],
    confidence: float,
    min_change: float,
) -> list[Change]:
    """ppl ratio and agreement. The same text in both runs: sequences are drawn in pairs, so that only the gates differ."""
    sums = [(c["quality"] or {}).get("per_sequence") for c in (before, after)]
    if not all(sums):
        return []
    a, b = ({k: np.array(v) for k, v in s.items()} for s in sums if s)
    same = np.array_equal(a["tokens"], b["tokens"]) and np.allclose(a["nll_dense"], b["nll_dense"], rtol=1e-3)
    size_a, size_b = len(a["tokens"]), len(b["tokens"])
    picks_a = rng.integers(0, size_a, size=(DRAWS, size_a))
    picks_b = picks_a if same else rng.integers(0, size_b, size=(DRAWS, size_b))
    where = "quality" + ("" if same else ", other text")
    found = []
    for figure, value, more in (("ppl ratio", _ppl_ratio, False), ("agreement", _agreement, True)):
        if figure == "agreement" and not ("agree" in a and "agree" in b):  # a server tells none
            continue
        drawn = value({k: v[picks_b] for k, v in b.items()}) / value({k: v[picks_a] for k, v in a.items()})
        found.append(_change(name, where, figure, float(value(a)), float(value(b)), drawn, more, size_a, size_b,
                             confidence, min_change))  # fmt: skip
    return found


def _tasks(
    rng: np.random.Generator,
    name: str,
    before: dict[str, Any],
    after: dict[str, Any],
    confidence: float,
    min_change: float,
) -> list[Change]:
    """Scores of tasks, document by document; a metric that has no value per document has no verdict."""
    old, new = ((c["quality"] or {}).get("tasks") or {} for c in (before, after))
    found = []
    for task in [task for task in old if task in new]:
        for metric, score in old[task]["metrics"].items():
            other = new[task]["metrics"].get(metric)
            if other is None or not score["own"]:
                continue
            a, b = (_documents(run[task], metric) for run in (old, new))
            drawn = np.empty(0)
            if len(a) == len(b) >= FEWEST:
                picks = rng.integers(0, len(a), size=(DRAWS, len(a)))
                below, above = a[picks].mean(-1), b[picks].mean(-1)
                drawn = (above / below)[below > 0] if np.any(below > 0) else drawn
            count = len(a) if len(drawn) else 0
            found.append(_change(name, task, metric, score["own"], other["own"], drawn, score["higher_is_better"], count, count,
                                 confidence, min_change))  # fmt: skip
    return found


def _documents(task: dict[str, Any], metric: str) -> Array:
    """The metric's value for each document, or nothing where there is none for each."""
    rows = [row.get("gated", {}).get(metric) for table in task["samples"].values() for row in table]
    return np.array(rows if all(isinstance(x, int | float) for x in rows) else [], dtype=np.float64)


def _ppl_ratio(sums: dict[str, Array]) -> Array:
    return np.exp((sums["nll_gated"].sum(-1) - sums["nll_dense"].sum(-1)) / sums["tokens"].sum(-1))


def _agreement(sums: dict[str, Array]) -> Array:
    return sums["agree"].sum(-1) / sums["tokens"].sum(-1)


def _environment(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs besides the figures."""
    found = []
    for part in ("versions", "machine", "subject"):
        for key in sorted(before[part].keys() | after[part].keys()):
            a, b = before[part].get(key), after[part].get(key)
            if a != b and key not in MEASURED:
                found.append(f"{key}: {a} before, {b} after" if not isinstance(a, dict) else f"{key} differs")
    for key in ("backend", "baseline", "workload", "seed"):
        if before[key] != after[key]:
            found.append(f"{key}: {before[key]} before, {after[key]} after")
    return found
