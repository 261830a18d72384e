"""Tasks of the harness, dense and gated with the same weights in one process, and what each task lost.

Always true: tasks are run one at a time, so that a skip ratio belongs to a task, and compared one at a time, because an
average hides the one that collapsed.

    report = evaluate_tasks(lm, ["arc_easy"], EvalOptions(limit=100))
    report.tasks[0].metrics["acc,none"].drop
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

from sedac_cli.artifacts.files import plain, write_json
from sedac_cli.artifacts.manifest import ModelIdentity, make_step
from sedac_cli.errors import InputError, PromiseMissedError, SedacError, UsageError, did_you_mean
from sedac_cli.harness.model import SedacLM


@dataclass(frozen=True)
class EvalOptions:
    include_path: Path | None = None
    limit: float | None = None
    num_fewshot: int | None = None
    dense: bool = True
    chat: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Metric:
    """One figure of a task. `drop`: how much worse gated is; of a metric that should be high in its own unit, of one that
    should be low relative to dense. `lost` and `won`: documents that got worse and better."""

    higher_is_better: bool
    gated: float
    gated_stderr: float | None
    dense: float | None = None
    dense_stderr: float | None = None
    drop: float | None = None
    lost: int | None = None
    won: int | None = None


@dataclass(frozen=True)
class TaskReport:
    task: str
    version: Any
    samples: int
    skip_ratio: float
    tokens: int
    metrics: dict[str, Metric]
    samples_raw: dict[str, list[dict[str, Any]]]
    """Per sub-task and document: what each metric gave, dense and gated."""


@dataclass(frozen=True)
class EvalReport:
    model: ModelIdentity
    gate: str
    parameters: dict[str, Any]
    options: dict[str, Any]
    tasks: list[TaskReport]

    def broken(self, max_drop: float) -> list[str]:
        """Metrics that lost more than `max_drop`, in words. NaN is a loss."""
        return [
            f"{task.task} {name}: {metric.dense:.4f} -> {metric.gated:.4f}"
            for task in self.tasks
            for name, metric in task.metrics.items()
            if metric.drop is not None and not metric.drop <= max_drop
        ]


def evaluate_tasks(
    lm: SedacLM, tasks: Sequence[str], options: EvalOptions, manager: TaskManager | None = None,
    known: dict[str, Any] | None = None,
) -> EvalReport:  # fmt: skip
    """`manager`: what `find_tasks` found, if it was asked before. `known`: what the dense model answered, by task; what is
    missing is added, so that several gates of one model can share it."""
    manager = manager or find_tasks(tasks, options.include_path)
    known = {} if known is None else known
    reports = [evaluate_task(lm, task, manager, options, known) for task in tasks]
    gate = lm.plan.gate
    return EvalReport(lm.loaded.identity, gate.name, plain(gate.parameters()), plain(asdict(options)), reports)


def find_tasks(tasks: Sequence[str], include_path: Path | None) -> TaskManager:
    """The harness's tasks and those of a folder; unknown names are refused before a model runs."""
    if include_path is not None and not include_path.is_dir():
        raise InputError(f"no such folder: {include_path}", hint="--include-path takes a folder with task YAML files")
    if not tasks:
        raise UsageError("no task named", hint="--tasks arc_easy,hellaswag")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if include_path is not None:  # reading the harness's own 14,000 task files takes ten seconds and more
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(tasks) <= set(own.all_tasks):
            return own
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    known = list(manager.all_tasks)
    for task in tasks:
        if task not in known:
            raise UsageError(
                f"the harness has no task '{task}'.{did_you_mean(task, known)}",
                hint="`lm-eval ls tasks` lists them; --include-path FOLDER adds your own",
            )
    return manager


def evaluate_task(
    lm: SedacLM, task: str, manager: TaskManager, options: EvalOptions, known: dict[str, Any]
) -> TaskReport:
    dense = None
    if options.dense and not lm.plan.gate.trivial:
        if task not in known:
            known[task] = _run(lm, task, manager, options, gated=False)
        dense = known[task]
    lm.reset()
    gated = _run(lm, task, manager, options, gated=True)
    raw = _per_document(gated, "gated")
    for name, rows in ({} if dense is None else _per_document(dense, "dense")).items():
        for row, other in zip(raw[name], rows, strict=True):
            row.update(other)
    found = {"gated": gated, "dense": dense or gated}
    counts = gated["n-samples"]
    return TaskReport(
        task=task,
        version=gated["versions"].get(task),
        samples=sum(count["effective"] for count in counts.values()),
        skip_ratio=lm.skip_ratio,
        tokens=lm.tokens,
        metrics=_metrics(task, found, raw if options.dense else None),
        samples_raw=raw,
    )


def _run(lm: SedacLM, task: str, manager: TaskManager, options: EvalOptions, gated: bool) -> dict[str, Any]:
    lm.gated = gated
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed"), options.seed)
    try:
        results = lm_eval.simple_evaluate(
            model=lm, tasks=[task], task_manager=manager, limit=options.limit, num_fewshot=options.num_fewshot,
            apply_chat_template=options.chat, fewshot_random_seed=options.seed, log_samples=True,
            bootstrap_iters=1000, **seeds,
        )  # fmt: skip
    except SedacError:
        raise
    except (OSError, ValueError, KeyError, AssertionError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"the harness cannot run task '{task}': {type(error).__name__}: {first}") from error
    finally:
        lm.gated = True
    if results is None:
        raise InputError(
            "`sedac eval` runs in one process", hint="python -m sedac_cli.harness, under accelerate launch"
        )
    return results  # type: ignore[return-value]


def _metrics(task: str, found: dict[str, Any], raw: dict[str, list[dict[str, Any]]] | None) -> dict[str, Metric]:
    gated, dense = found["gated"]["results"][task], found["dense"]["results"][task]
    better = found["gated"]["higher_is_better"].get(task, {})
    metrics = {}
    for name, value in gated.items():
        base, _, filtered = name.partition(",")
        if not isinstance(value, (int, float)) or base.endswith("_stderr") or base not in better:
            continue
        high = better[base] is not False
        error = f"{base}_stderr,{filtered}"
        if raw is None:
            metrics[name] = Metric(high, float(value), _number(gated.get(error)))
            continue
        before, after = float(dense[name]), float(value)
        drop = before - after if high else (after - before) / abs(before) if before else math.nan
        lost, won = _changes(name, high, raw)
        error_before, error_after = _number(dense.get(error)), _number(gated.get(error))
        metrics[name] = Metric(high, after, error_after, before, error_before, drop, lost, won)
    return metrics


def _changes(name: str, high: bool, raw: dict[str, list[dict[str, Any]]]) -> tuple[int | None, int | None]:
    """Documents that got worse and better; None where a document has no value of its own (perplexities are added up)."""
    rows = [row for rows in raw.values() for row in rows if "dense" in row]
    pairs = [(row["dense"].get(name), row["gated"].get(name)) for row in rows]
    if not pairs or not all(isinstance(value, (int, float)) for pair in pairs for value in pair):
        return None, None
    fell, rose = sum(b < a for a, b in pairs), sum(b > a for a, b in pairs)
    return (fell, rose) if high else (rose, fell)


def _per_document(results: dict[str, Any], side: str) -> dict[str, list[dict[str, Any]]]:
    """By sub-task, in the documents' order: {"doc": number, side: {"metric,filter": value}}."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for task, samples in results["samples"].items():
        rows: dict[int, dict[str, Any]] = {}
        for sample in samples:
            row = rows.setdefault(sample["doc_id"], {"doc": sample["doc_id"], side: {}})
            for metric in sample.get("metrics", []):
                row[side][f"{metric},{sample.get('filter', 'none')}"] = _plain_number(sample[metric])
        tables[task] = [rows[number] for number in sorted(rows)]
    return tables


def _plain_number(value: Any) -> Any:
    """Per-document values are numbers for most metrics; others keep tuples (log-likelihood, words) to add up later."""
    if isinstance(value, (list, tuple)):
        return [_plain_number(item) for item in value]
    return value.item() if hasattr(value, "item") else value


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def write_evaluation(path: Path, report: EvalReport) -> dict[str, Any]:
    """`eval.json`: the report with every document's values, the command, settings and versions."""
    document = plain(report)
    step = make_step(report.options, {}, {})
    versions = step.versions | {"lm_eval": version("lm_eval")}
    write_json(path, {"schema_version": 1, "report": document, "command": step.command, "versions": versions})
    return document


def check_drop(report: EvalReport, max_drop: float) -> None:
    broken = report.broken(max_drop)
    if broken:
        raise PromiseMissedError(
            f"more than {max_drop:g} lost: " + "; ".join(broken), hint="a stricter gate: `sedac calibrate`"
        )
