"""Run a matrix: every configuration beside dense, interleaved A B A B, in every cell; one that crashes is a row, not the end.

document = run_matrix(matrix, backend, seed=0)
document["configurations"][1]["cells"][0]["speedup"]["median"]
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np

from sedac_cli.artifacts.files import plain
from sedac_cli.bench.backends import Backend, Cell, Session
from sedac_cli.bench.document import new_document
from sedac_cli.bench.matrix import DENSE, Experiment, Matrix
from sedac_cli.bench.metrics import Run, paired, summarize
from sedac_cli.bench.pairing import Dense, Pair, beside
from sedac_cli.bench.plans import label_of
from sedac_cli.bench.workload import Workload
from sedac_cli.config import TextSpec
from sedac_cli.corpus import Corpus
from sedac_cli.errors import InputError, SedacError
from sedac_cli.pipeline import Progress, quiet_progress

Save = Callable[[dict[str, Any]], None]


def with_baseline(matrix: Matrix) -> list[Experiment]:
    """Dense first. A server is what it is: there dense is only measured where a matrix says which server that would be."""
    dense = [x for x in matrix.experiments if x.is_baseline]
    others = [x for x in matrix.experiments if x not in dense[:1]]
    if not dense and matrix.backend != "openai":
        dense = [DENSE]
    return dense[:1] + others


def run_matrix(
    matrix: Matrix, backend: Backend, seed: int, *, command: list[str], save: Save = lambda document: None,
    note: Callable[[str], None] = lambda text: None, progress: Progress = quiet_progress,
) -> dict[str, Any]:  # fmt: skip
    """The whole document of `bench.json`. `save` gets it after every configuration: a run that is killed keeps its figures."""
    experiments = with_baseline(matrix)
    workload = Workload.of(matrix, backend.tokenizer, seed)
    results = {x.name: _empty(x) for x in experiments}
    document = new_document(matrix, backend, workload.describe(), command, seed)
    document["configurations"] = list(results.values())
    cells = backend.cells()
    dense = experiments[0] if experiments[0].is_baseline else None
    pooled: dict[tuple[str, str], list[Run]] = {}
    rounds = [(cell, experiments) for cell in cells]
    if backend.one_at_a_time and dense is not None and len(experiments) > 1:
        rounds = [(cell, [dense, experiment]) for experiment in experiments[1:] for cell in cells]
    with progress(total=len(rounds), desc="bench", unit="round") as bar:
        for cell, some in rounds:
            _run_cell(matrix, backend, workload, cell, some, results, pooled, note)
            bar.update(1)
            document["subject"], document["baseline"] = backend.describe(), backend.baseline
            save(document)
    for experiment in experiments:
        _judge_quality(matrix, backend, workload, experiment, results[experiment.name], seed, note)
        save(document)
    for experiment in experiments:
        results[experiment.name]["summary"] = _headline(results[experiment.name])
    document["missed"] = [miss for x in experiments if x is not dense for miss in missed(matrix, x, results[x.name])]
    document["crashed"] = [r["name"] for r in results.values() if r["status"] == "crashed"]
    document["random_weights"] |= any((r["quality"] or {}).get("random_weights") for r in results.values())
    document["complete"] = True
    save(document)
    return document


def _empty(experiment: Experiment) -> dict[str, Any]:
    how = experiment.how
    return {
        "name": experiment.name, "mode": how.name, "gate": label_of(experiment), "engine": None,
        "speculative_config": plain(experiment.drafts) if how.draft else None, "lossless": how.loop,
        "status": "ok", "errors": [], "cells": [], "quality": None, "summary": {},
    }  # fmt: skip


def _run_cell(
    matrix: Matrix, backend: Backend, workload: Workload, cell: Cell, experiments: list[Experiment],
    results: dict[str, dict[str, Any]], pooled: dict[tuple[str, str], list[Run]], note: Callable[[str], None],
) -> None:  # fmt: skip
    """Dense stays open; the others come and go beside it, each paired with dense runs of its own, in its own engine."""
    own_dense = results[experiments[0].name] if len(experiments) > 1 and experiments[0].is_baseline else None
    beside_dense: set[str] = set()
    with ExitStack() as stack:
        dense = None
        if own_dense is not None:
            dense = Dense(backend, experiments[0], cell, stack, lambda error: _crashed(own_dense, cell, error, note))
        for experiment in experiments[1:] if dense else experiments:
            result = results[experiment.name]
            try:
                with beside(backend, experiment, cell, dense) as pair:
                    _note_refusals(experiment, cell, pair, note)
                    pairs = _measured(matrix, backend, workload, cell, pair, experiment)
                measured = [run for run, _ in pairs if run is not None]
                if measured:  # dense figures are those of all its runs in an engine, beside whatever they were
                    beside_dense.add(pair.engine)
                    pooled.setdefault((cell.label, pair.engine), []).extend(measured)
                _add_cell(result, cell, pairs, pair.engine, pair.refused)
                _note_failures(result, cell, note)
            except Exception as error:
                _crashed(result, cell, error, note)
    if own_dense is not None:
        for engine in sorted(beside_dense):
            _add_cell(own_dense, cell, [(None, run) for run in pooled[cell.label, engine]], engine, {})
            _note_failures(own_dense, cell, note)
    if experiments[0].is_baseline:
        _add_asides(matrix, backend, workload, cell, results[experiments[0].name], note)


def _add_asides(
    matrix: Matrix, backend: Backend, workload: Workload, cell: Cell, dense: dict[str, Any], note: Callable[[str], None]
) -> None:  # fmt: skip
    """Once all sessions are closed. A side note is not worth a crash."""
    for found in dense["cells"]:
        if found["label"] == cell.label:
            try:
                found["aside"] = backend.aside(cell, found["engine"], _prompts(matrix, backend, workload, cell)[0])
            except Exception as error:
                note(f"{cell.label}: no side note of eager generate(): {type(error).__name__}: {error}")


def _add_cell(
    result: dict[str, Any], cell: Cell, pairs: list[tuple[Run | None, Run]], engine: str, refused: dict[str, str]
) -> None:
    """In place of what was known of the same work in the same engine."""
    kept = [found for found in result["cells"] if (found["label"], found["engine"]) != (cell.label, engine)]
    result["cells"] = [*kept, _cell(cell, pairs) | {"engine": engine, "engines_refused": refused}]
    result["engine"] = ", ".join(dict.fromkeys(found["engine"] for found in result["cells"]))


def _note_refusals(experiment: Experiment, cell: Cell, pair: Pair, note: Callable[[str], None]) -> None:
    for engine, why in pair.refused.items():
        what = f"{experiment.name} runs" if pair.dense is None else f"{experiment.name} and dense beside it run"
        note(f"{cell.label}: {what} in the {pair.engine} engine; the {engine} engine refuses: {why}")


def _note_failures(result: dict[str, Any], cell: Cell, note: Callable[[str], None]) -> None:
    """Requests that failed are in the samples; that there were any is in the table, and no success."""
    found = result["cells"][-1].get("requests")
    if found and found["failed"]:
        reasons = "; ".join(f"{count}x {error}" for error, count in found["errors"].items())
        _crashed(result, cell, InputError(f"{found['failed']} of {found['sent']} requests failed: {reasons}"), note)


def _prompts(matrix: Matrix, backend: Backend, workload: Workload, cell: Cell) -> list[list[str]]:
    """Other prompts in every repeat, the same for dense and for what is compared with it."""
    each = backend.prompts_per_run(cell)
    if cell.prompt_length is not None:
        every = workload.prompts(cell.prompt_length, each * matrix.repeats)
    else:  # online: lengths mixed
        per_length = math.ceil(each * matrix.repeats / len(matrix.prompt_lengths))
        columns = [workload.prompts(length, per_length) for length in matrix.prompt_lengths]
        every = [prompt for row in zip(*columns, strict=True) for prompt in row]
    return [every[r * each : (r + 1) * each] for r in range(matrix.repeats)]


def _alone(matrix: Matrix, backend: Backend, workload: Workload, cell: Cell, session: Session) -> list[Run]:
    prompts = _prompts(matrix, backend, workload, cell)
    for _ in range(matrix.warmup):
        session.run(prompts[0][: cell.batch], cell.new_tokens)
    return [session.run(batch, cell.new_tokens) for batch in prompts]


def _measured(
    matrix: Matrix, backend: Backend, workload: Workload, cell: Cell, pair: Pair, experiment: Experiment
) -> list[tuple[Run | None, Run]]:
    if pair.dense is None:
        return [(None, run) for run in _alone(matrix, backend, workload, cell, pair.own)]
    return _interleaved(matrix, backend, workload, cell, pair.dense, pair.own, experiment)


def _interleaved(
    matrix: Matrix,
    backend: Backend,
    workload: Workload,
    cell: Cell,
    base: Session,
    own: Session,
    experiment: Experiment,
) -> list[tuple[Run | None, Run]]:
    prompts = _prompts(matrix, backend, workload, cell)
    for _ in range(matrix.warmup):
        base.run(prompts[0][: cell.batch], cell.new_tokens)
        own.run(prompts[0][: cell.batch], cell.new_tokens)
    pairs: list[tuple[Run | None, Run]] = []
    for repeat, batch in enumerate(prompts):
        # Who goes first takes turns: what the first of a pair pays for, or gains, then meets both.
        first, second = (base, own) if repeat % 2 == 0 else (own, base)
        made = [first.run(batch, cell.new_tokens), second.run(batch, cell.new_tokens)]
        dense, run = made if first is base else made[::-1]
        if experiment.how.loop and run.drafts is not None:
            same = sum(a == b for a, b in zip(dense.tokens, run.tokens, strict=True))
            run = replace(run, drafts=run.drafts | {"identical": same, "sequences": len(run.tokens)})
        pairs.append((dense, run))
    return pairs


def _cell(cell: Cell, pairs: list[tuple[Run | None, Run]]) -> dict[str, Any]:
    own = [run for _, run in pairs]
    dense = [run for run, _ in pairs if run is not None]
    sound = [(d, o) for d, o in pairs if d is not None and _compares(d) and _compares(o)]
    found: dict[str, Any] = {"label": cell.label, **plain(cell), **summarize(own)}
    if sound and cell.rate is None:  # at a given rate, the rate sets the pace
        for key, field in (
            ("speedup", "seconds"),
            ("decode_speedup", "decode_seconds"),
            ("prefill_speedup", "prefill_seconds"),
        ):
            times = [[_per_token(run, field) for run in runs] for runs in zip(*sound, strict=True)]
            known = [[value for value in row if value is not None] for row in times]
            found[key] = paired(known[0], known[1]) if len(known[0]) == len(known[1]) == len(sound) else None
    found["samples"] = {"own": [_sample(run) for run in own], "dense": [_sample(run) for run in dense]}
    return found


def _compares(run: Run) -> bool:
    """A run in which requests failed did less work."""
    return run.new_tokens > 0 and not any(request.error for request in run.requests)


def _per_token(run: Run, field: str) -> float | None:
    """Seconds per token: offline both sides make the same number, a server may end its texts earlier."""
    seconds = getattr(run, field)
    return None if seconds is None else seconds / (run.prompt_tokens if field == "prefill_seconds" else run.new_tokens)


def _sample(run: Run) -> dict[str, Any]:
    return {key: value for key, value in plain(run).items() if key != "tokens"}


def _crashed(result: dict[str, Any], cell: Cell | None, error: Exception, note: Callable[[str], None]) -> None:
    first = (str(error).strip() or "no message").splitlines()[0]
    known = isinstance(error, SedacError)
    result["status"] = "crashed"
    result["errors"].append(
        {
            "where": "quality" if cell is None else cell.label,
            "error": first if known else f"{type(error).__name__}: {first}",
            "hint": getattr(error, "hint", None),
            "traceback": None if known else "".join(traceback.format_exception(error)[-6:]),
        }
    )
    note(f"{result['name']}: {result['errors'][-1]['error']}; the run goes on")


def _judge_quality(
    matrix: Matrix, backend: Backend, workload: Workload, experiment: Experiment, result: dict[str, Any], seed: int,
    note: Callable[[str], None],
) -> None:  # fmt: skip
    """What the loop emits is dense's own text: nothing to judge beyond its being the same."""
    wanted = matrix.quality
    if experiment.how.loop or (experiment.is_baseline and matrix.backend == "hf"):
        return
    if not (wanted.samples or wanted.tasks) or (result["status"] == "crashed" and not result["cells"]):
        return
    corpus = None
    prompts: list[str] = []
    if wanted.samples and backend.name == "hf":
        text = TextSpec(matrix.dataset, matrix.split, samples=wanted.samples, max_length=wanted.max_length, seed=seed)
        corpus = Corpus(text, backend.tokenizer)
    elif wanted.samples:
        prompts = workload.prompts(wanted.max_length, wanted.samples)
    try:
        result["quality"] = backend.quality(experiment, corpus, prompts)
    except Exception as error:
        _crashed(result, None, error, note)


def _headline(result: dict[str, Any]) -> dict[str, Any]:
    """One line per configuration; over several cells, geometric means of ratios."""
    found: dict[str, Any] = {}
    for key in ("speedup", "decode_speedup", "prefill_speedup"):
        values = [cell[key]["median"] for cell in result["cells"] if cell.get(key)]
        found[key] = float(np.exp(np.mean(np.log(values)))) if values else None
    ratios = [cell["skip_ratio"] for cell in result["cells"] if cell["skip_ratio"] is not None]
    found["skip_ratio"] = float(np.mean(ratios)) if ratios else None
    measures = (result["quality"] or {}).get("measures") or {}
    found["ppl_ratio"], found["agreement"] = measures.get("ppl_ratio"), measures.get("agreement")
    made = [cell["drafts"] for cell in result["cells"] if cell.get("drafts")]
    if made:
        total = {k: sum(d[k] for d in made) for k in ("proposed", "accepted", "verify_tokens", "compared")}
        found["ar"] = total["accepted"] / total["proposed"] if total["proposed"] else None
        found["trr"] = total["accepted"] / total["verify_tokens"] if total["verify_tokens"] else None
        found["identical"] = sum(d["identical"] or 0 for d in made) if total["compared"] else None
        found["compared"] = total["compared"]
    return found


def missed(matrix: Matrix, experiment: Experiment, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Limits that were set and not kept; a figure that is not a number, or is not there, has not kept its limit."""
    limits, how, summary = matrix.limits(experiment), experiment.how, result["summary"]
    found: list[dict[str, Any]] = []

    def check(what: str, value: float | None, limit: float | None, most: bool, where: str = "") -> None:
        if limit is None:
            return
        kept = value is not None and (value <= limit if most else value >= limit)
        if not kept:
            found.append(
                {"configuration": experiment.name, "what": what, "found": value, "limit": limit, "where": where}
            )

    if how.draft:
        check("AR", summary.get("ar"), limits.min_ar, False)
        check("TRR", summary.get("trr"), limits.min_trr, False)
    if how.gated:
        check("ppl ratio", summary.get("ppl_ratio"), limits.max_ppl_ratio, True)
        check("agreement", summary.get("agreement"), limits.min_agreement, False)
    for cell in result["cells"]:
        check("speed-up", (cell.get("speedup") or {}).get("median"), limits.min_speedup, False, cell["label"])
    if limits.min_speedup is not None and not result["cells"]:
        check("speed-up", None, limits.min_speedup, False)
    return found
