"""The results as tables: the same rows for the terminal and for `report.md`.

for table in tables(document): print(table.title, table.columns, table.rows)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sedac_cli.artifacts.files import atomic_file
from sedac_cli.bench.document import floor_note, speed_note, work_label


@dataclass(frozen=True)
class Table:
    title: str
    columns: list[str]
    rows: list[list[str]]
    caption: str = ""
    long: bool = False
    """A row per layer: for the report, too much for a terminal."""


def tables(document: dict[str, Any]) -> list[Table]:
    builders = (_speed, _steps, _latency, _quality, _tasks, _drafts, _layers, _requests, _crashes)
    found = [table for build in builders if (table := build(document)).rows]
    label = " (random weights)" if document["random_weights"] else ""
    return [replace(table, title=table.title + label) for table in found]


def write_report(path: Path, document: dict[str, Any]) -> None:
    machine, subject = document["machine"], document["subject"]
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"]) or "no GPU"
    lines = [
        f"# sedac bench: {document['matrix']['name'] or 'measured'}",
        "",
        f"    {' '.join(document['command'])}",
        "",
        f"- model: {_model(document)}, {subject.get('dtype') or 'dtype unknown'} on {subject.get('device') or 'a server'}"
        + (" (**random weights: figures of quality mean nothing**)" if document["random_weights"] else ""),
        f"- machine: {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {gpus}; "
        f"{_share(machine['busy_before'])} busy before the run",
        f"- versions: {', '.join(f'{k} {v}' for k, v in document['versions'].items())}",
        f"- dense is: {document['baseline']}",
        f"- work: {document['workload']}; {document['matrix']['repeats']} pairs, interleaved; seed {document['seed']}",
        "- raw samples: `bench.json` beside this file",
        "",
    ]
    if not document["complete"]:
        lines += ["**The run did not finish: what follows is what it had.**", ""]
    lines += [f"- {line}" for line in _refusals(document)]
    for miss in document["missed"]:
        lines.append(f"- **limit missed**: {describe_miss(miss)}")
    for table in tables(document):
        lines += [
            "",
            f"## {table.title}",
            "",
            "| " + " | ".join(table.columns) + " |",
            "|" + "---|" * len(table.columns),
        ]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table.rows]
        if table.caption:
            lines += ["", table.caption]
    with atomic_file(path) as handle:
        handle.write(("\n".join(lines) + "\n").encode())


def _model(document: dict[str, Any]) -> str:
    """A server says itself what it serves, whatever a matrix takes for granted."""
    told = document["subject"].get("model")
    return told if isinstance(told, str) else str(document["matrix"]["base_model"])


def _refusals(document: dict[str, Any]) -> list[str]:
    return [
        f"{name}, {work}: in the {cell['engine']} engine, as the {engine} engine refused: {why}"
        for name, work, cell in _each_cell(document)
        for engine, why in (cell.get("engines_refused") or {}).items()
    ]


def describe_miss(miss: dict[str, Any]) -> str:
    where = f" ({miss['where']})" if miss["where"] else ""
    value = "not measured" if miss["found"] is None else f"{miss['found']:.4f}"
    return f"{miss['configuration']}: {miss['what']} {value}, limit {miss['limit']:g}{where}"


def _each_cell(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(configuration, work, cell), the same work of all configurations together."""
    configurations = document["configurations"]
    work = work_label(configurations)
    labels = list(dict.fromkeys(cell["label"] for c in configurations for cell in c["cells"]))
    return [
        (c["name"], work(cell), cell)
        for label in labels
        for c in configurations
        for cell in c["cells"]
        if cell["label"] == label
    ]


def _speed(document: dict[str, Any]) -> Table:
    rows = [
        [name, work, _ratio(cell.get("speedup")), _ratio(cell.get("decode_speedup")), _ratio(cell.get("prefill_speedup")),
         _rate(cell["tokens_per_second"]), _rate(cell["decode_tokens_per_second"]), _rate(cell["prefill_tokens_per_second"]),
         _share(cell["skip_ratio"])]
        for name, work, cell in _each_cell(document)
    ]  # fmt: skip
    columns = [
        "configuration", "work", "speed-up", "decode", "prefill", "tokens/s", "decode tok/s", "prefill tok/s", "MLPs skipped",
    ]  # fmt: skip
    return Table("speed", columns, rows, speed_note(document))


def _steps(document: dict[str, Any]) -> Table:
    """Beside a decode step, what it could not be faster than: where the run knows that."""
    rows = [
        [name, work, _ms(floor["took_seconds"], 3), _ms(floor["step_seconds"], 3), _share(floor["share"]["median"])]
        for name, work, cell in _each_cell(document)
        if (floor := cell.get("floor"))
    ]
    columns = ["configuration", "work", "step", "step floor", "of floor"]
    return Table("decode step and its floor", columns, rows, floor_note(document) if rows else "")


def _latency(document: dict[str, Any]) -> Table:
    rows = []
    for name, work, cell in _each_cell(document):
        ttft, itl = cell["ttft_seconds"] or {}, cell["itl_seconds"] or {}
        rows.append(
            [name, work, *(_ms(ttft.get(p)) for p in ("p50", "p99")), *(
                _ms(itl.get(p)) for p in ("p50", "p95", "p99")), _bytes(cell["peak_bytes"]), _joules(cell["joules_per_token"])]
        )  # fmt: skip
    return Table(
        "latency, memory, energy",
        ["configuration", "work", "TTFT p50", "TTFT p99", "ITL p50", "ITL p95", "ITL p99", "peak memory", "J/token"],
        rows,
        "TTFT: until the first token. ITL: between tokens; drafts that are accepted arrive together. - : not measurable here.",
    )


def _quality(document: dict[str, Any]) -> Table:
    rows = []
    for c in document["configurations"]:
        measures, spans = (c["quality"] or {}).get("measures"), (c["quality"] or {}).get("intervals", {})
        if measures:
            rows.append([
                c["name"], _number(measures.get("ppl_dense")), _number(measures.get("ppl_gated")),
                _with_span(measures, spans, "ppl_ratio"), _with_span(measures, spans, "agreement"),
                _with_span(measures, spans, "skip_ratio"),
            ])  # fmt: skip
    note = " RANDOM WEIGHTS: these figures mean nothing." if document["random_weights"] else ""
    return Table(
        "quality with the skips in force",
        ["configuration", "ppl dense", "ppl own", "ppl ratio", "agreement", "MLPs skipped"],
        rows,
        f"On text of {document['matrix']['dataset']}; 95 % intervals over sequences.{note}",
    )


def _tasks(document: dict[str, Any]) -> Table:
    rows = []
    for c in document["configurations"]:
        for task, found in ((c["quality"] or {}).get("tasks") or {}).items():
            for metric, score in found["metrics"].items():
                high, drop = score["higher_is_better"], score["drop"]
                change = "-" if drop is None else f"{score['own'] - score['dense']:+.4f}" if high else f"{drop:+.2%}"
                rows.append([
                    c["name"], task, metric if high else f"{metric} (low)", str(found["documents"]),
                    _with_error(score["dense"], score["dense_stderr"]), _with_error(score["own"], score["own_stderr"]),
                    change, *("-" if score[k] is None else str(score[k]) for k in ("worse", "better")),
                    _share(found["skip_ratio"]),
                ])  # fmt: skip
    return Table(
        "tasks (lm-eval)",
        ["configuration", "task", "metric", "documents", "dense", "own", "change", "worse", "better", "MLPs skipped"],
        rows,
        "+-: standard error as the harness gives it. low: is good, and its change relative. worse, better: documents whose own "
        "value changed.",
    )


def _drafts(document: dict[str, Any]) -> Table:
    rows = []
    for name, work, cell in _each_cell(document):
        d = cell.get("drafts")
        if d:
            same = "-" if d["identical"] is None else f"{d['identical']} of {d['compared']}"
            rows.append([
                name, work, _share(d["ar"]), _share(d["break_even_measured"]), _share(d["break_even_flops"]),
                _share(d["trr"]), _number(d["tokens_per_step"]), same, str(d["near_ties"]),
            ])  # fmt: skip
    return Table(
        "drafts",
        [
            "configuration",
            "work",
            "AR",
            "pays above, clock",
            "pays above, FLOPs",
            "TRR",
            "tokens/step",
            "as dense",
            "near ties",
        ],
        rows,
        "AR: drafts accepted / proposed. Pays above: the AR at which it breaks even with one-token dense steps, from the measured "
        "times of this run and from FLOPs (a verify pass counted as one step: weight-bound). TRR: tokens of verify steps that "
        "were drafted. As dense: sequences equal to dense's, token for token. Near ties: emitted tokens whose best two logits "
        "are so close that rounding may choose.",
    )


def _layers(document: dict[str, Any]) -> Table:
    skipping = [(name, work, cell) for name, work, cell in _each_cell(document) if cell["skip_ratio_per_layer"]]
    if not skipping:
        return Table("MLPs skipped per layer", [], [])
    layers = len(skipping[0][2]["skip_ratio_per_layer"])
    rows = [
        [str(layer), *(f"{cell['skip_ratio_per_layer'][layer]:.1%}" for _, _, cell in skipping)]
        for layer in range(layers)
        if any(cell["skip_ratio_per_layer"][layer] for _, _, cell in skipping)
    ]
    return Table("MLPs skipped per layer", ["layer", *(f"{name}, {work}" for name, work, _ in skipping)], rows,
                 long=True)  # fmt: skip


def _requests(document: dict[str, Any]) -> Table:
    rows = []
    for name, work, cell in _each_cell(document):
        r = cell.get("requests")
        if r:
            latency = cell["latency_seconds"] or {}
            errors = "; ".join(f"{count}x {error}" for error, count in r["errors"].items())
            rows.append([
                name, work, str(r["done"]), str(r["failed"]), _rate(cell["requests_per_second"], 2),
                _ms(latency.get("p50")), _ms(latency.get("p99")), errors or "-",
            ])  # fmt: skip
    return Table(
        "requests", ["configuration", "load", "done", "failed", "requests/s", "latency p50", "p99", "errors"], rows
    )


def _crashes(document: dict[str, Any]) -> Table:
    rows = [[c["name"], e["where"], e["error"]] for c in document["configurations"] for e in c["errors"]]
    return Table("crashed", ["configuration", "where", "error"], rows)


def _ratio(value: dict[str, Any] | None) -> str:
    if value is None:
        return "-"
    span = f"n = {value['n']}" if value["low"] is None else f"{value['low']:.3f} .. {value['high']:.3f}"
    return f"{value['median']:.3f}x ({span})"


def _rate(value: dict[str, Any] | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value['median']:,.{digits}f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _with_error(value: float | None, error: float | None) -> str:
    return _number(value) + ("" if error is None else f" +- {_number(error)}")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _ms(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value * 1000:.{digits}f} ms"


def _bytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 2**20:,.0f} MiB"


def _joules(value: dict[str, Any] | None) -> str:
    return "-" if value is None else f"{value['median']:.3f}"


def _with_span(measures: dict[str, Any], spans: dict[str, Any], key: str) -> str:
    if measures.get(key) is None:
        return "-"
    span = spans.get(key)
    return f"{measures[key]:.4f}" + (f" ({span[0]:.4f} .. {span[1]:.4f})" if span else "")
