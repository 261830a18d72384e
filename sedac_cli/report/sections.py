"""From the files of a run to what the page shows: figures, tables, sentences. Every part is optional; none is invented.

page = build_page(read_run(folder)); page["figures"]["ppl"]
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sedac_cli import __version__
from sedac_cli.artifacts.thresholds import Promise
from sedac_cli.report import plots
from sedac_cli.report.plots import Line, Point
from sedac_cli.report.sources import RunData
from sedac_cli.report.verdict import verdict


@dataclass(frozen=True)
class Table:
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


def build_page(run: RunData) -> dict[str, Any]:
    """What the template is filled with. A section that cannot be made of damaged data is left out and named."""
    page: dict[str, Any] = {
        "version": __version__, "folder": run.folder.resolve().name, "model": run.model_ref, "gate": _gate(run),
        "verdict": verdict(run), "problems": list(run.problems), "missing": run.missing, "figures": {}, "tables": {},
        "heat": None, "random_weights": _random_weights(run),
    }  # fmt: skip
    parts: dict[str, Callable[[RunData, dict[str, Any]], None]] = {
        "key figures": key_figures, "the curve": curves, "layers": layers, "sensitivity": sensitivity,
        "where quality is lost": bins, "speed": speed, "the text": heat, "how it was made": provenance,
    }  # fmt: skip
    for name, build in parts.items():
        try:
            build(run, page)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            page["problems"].append(f"{name} could not be shown: {type(error).__name__}: {error}")
    return page


def _gate(run: RunData) -> str | None:
    if run.thresholds is not None:
        return run.thresholds.gate
    if run.validation is not None:
        return str(run.validation["report"].get("gate"))
    return next((gates.kind for gates in run.gates.values()), None)


def _random_weights(run: RunData) -> bool:
    return bool((run.bench or {}).get("random_weights") or (run.tokens or {}).get("random_weights"))


def key_figures(run: RunData, page: dict[str, Any]) -> None:
    rows = []
    for name, document in run.validations.items():
        report = document["report"]
        m, spans = report["measures"], report["intervals"]
        saved = report.get("reality", {}).get("compute_saved")

        def span(key: str, spans: dict[str, Any] = spans) -> str:
            return " .. ".join("inf" if x is None else f"{x:.4f}" for x in spans[key])

        label = report["gate"] if len(run.validations) == 1 else f"{report['gate']} ({name})"
        rows.append(
            [label, f"{m['skip_ratio']:.1%}", _share(saved), _number(m["ppl_ratio"]), span("ppl_ratio"),
             _number(m["agreement"]), span("agreement"), _number(m.get("kl")), f"{report['predicted_tokens']:,}"]
        )  # fmt: skip
    if rows:
        page["tables"]["quality"] = Table(
            ["gate", "MLPs skipped", "compute saved", "ppl ratio", "95 %", "agreement", "95 %", "KL, nats", "tokens"], rows,
            "Compute saved counts gates and stand-ins as cost; it is arithmetic, not a clock.",
        )  # fmt: skip


def curves(run: RunData, page: dict[str, Any]) -> None:
    for key, label, reference in (
        ("ppl_ratio", "ppl ratio to dense", 1.0),
        ("agreement", "agreement with dense", None),
    ):
        lines, points = _lines(run, key), _points(run, key)
        limit = None
        promise = None if run.thresholds is None else run.thresholds.promise
        if promise is not None and promise.kind == "certified":
            limit = float(promise.target["limit"]) if _promised(promise) == key else None
        if lines or points:
            page["figures"][key] = plots.curve_figure(lines, points, label, reference, limit)


def _lines(run: RunData, key: str) -> list[Line]:
    lines = []
    for name, gates in run.gates.items():
        if gates.curve:
            lines.append(
                Line(f"{name}: while distilling", [r["share"] for r in gates.curve], [r[key] for r in gates.curve])
            )
    promise = None if run.thresholds is None else run.thresholds.promise
    if promise is not None and promise.candidates and _promised(promise) == key:
        rows = promise.candidates
        marked = [bool(r["certified"]) for r in rows]
        lines.append(Line("calibration", [r["skip_ratio"] for r in rows], [r["value"] for r in rows], marked))
    return lines


def _promised(promise: Promise) -> str:
    """The measure a certified promise is about, as validate names it."""
    measure = str(promise.target.get("measure"))
    return "ppl_ratio" if measure == "ppl" else measure


def _points(run: RunData, key: str) -> list[Point]:
    points = []
    for name, document in run.validations.items():
        report = document["report"]
        m, span = report["measures"], report["intervals"][key]
        if m[key] is not None:
            label = f"validate: {report['gate']}" if len(run.validations) == 1 else f"{report['gate']} ({name})"
            points.append(Point(label, m["skip_ratio"], m[key], *span))
    for configuration in _configurations(run):
        quality = configuration.get("quality") or {}
        m, span = quality.get("measures") or {}, (quality.get("intervals") or {}).get(key) or (None, None)
        if m.get(key) is not None and m.get("skip_ratio") is not None:
            points.append(Point(f"bench: {configuration['name']}", m["skip_ratio"], m[key], *span))
    return points


def layers(run: RunData, page: dict[str, Any]) -> None:
    if run.validation is None:
        return
    report = run.validation["report"]
    simulated = report.get("simulation")
    page["figures"]["layers"] = plots.layers_figure(
        report["reality"]["skip_rates"], simulated and simulated["skip_rates"], "simulated on the dense model's states"
    )


def sensitivity(run: RunData, page: dict[str, Any]) -> None:
    promise = None if run.thresholds is None else run.thresholds.promise
    if promise is not None and promise.candidates:
        known = ("skip_ratio", "loss", "value", "p", "clipped_above", "neighbour_correlation", "certified")
        rows = []
        for row in promise.candidates:
            setting = ", ".join(f"{k} {v:g}" for k, v in row.items() if k not in known and isinstance(v, int | float))
            rows.append(
                [setting or "-", f"{row['skip_ratio']:.2%}", _number(row["value"]), f"{row['p']:.3g}",
                 "certified" if row["certified"] else "not certified"]
            )  # fmt: skip
        page["tables"]["ladder"] = Table(
            ["setting", "MLPs skipped", str(promise.target.get("measure")), "p-value", ""], rows,
            "Tested from strict to loose on the calibration text, up to the first that fails.",
        )  # fmt: skip
    elif run.thresholds is not None and run.thresholds.found_by.get("checkpoints"):
        page["tables"]["ladder"] = Table(
            ["layer", "threshold", "wanted", "exits, of those that reach it", "label of exited", "of kept"],
            [
                [str(c["layer"]), f"{c['threshold']:.4f}", _share(c["target_rate"]), _share(c["exit_rate"]),
                 _number(c["exited_label"]), _number(c["kept_label"])]
                for c in run.thresholds.found_by["checkpoints"]
            ],
            f"On the calibration text; the label is '{run.thresholds.target_label}'.",
        )  # fmt: skip
    if run.tokens is None or not run.tokens.get("value"):
        return
    kind = run.tokens["value"]
    values: dict[int, list[float]] = {}
    for token in run.tokens["tokens"]:
        for layer, value in token["values"].items():
            values.setdefault(int(layer), []).append(value)
    limits = _limits(run.tokens)
    if values and kind in ("risk", "score"):
        page["figures"]["shares"] = plots.shares_figure(values, limits, kind)


def _limits(tokens: dict[str, Any]) -> dict[int, float]:
    """The thresholds in force, by layer."""
    told = tokens.get("parameters") or {}
    if "checkpoints" in told and "thresholds" in told:
        return dict(zip(map(int, told["checkpoints"]), told["thresholds"], strict=False))
    if "layers" in told and "threshold" in told:
        return {int(layer): float(told["threshold"]) for layer in told["layers"]}
    return {}


def bins(run: RunData, page: dict[str, Any]) -> None:
    if run.validation is None:
        return
    for title, rows in (run.validation["report"].get("bins") or {}).items():
        page["tables"].setdefault("bins", []).append(
            (title, Table(
                ["bin", "tokens", "MLPs skipped", "ppl ratio", "agreement"],
                [[b["bin"], f"{b['tokens']:,}", _share(b["skip_ratio"]), _number(b["ppl_ratio"]), _number(b["agreement"])]
                 for b in rows],
            ))
        )  # fmt: skip


def _configurations(run: RunData) -> list[dict[str, Any]]:
    return [c for c in (run.bench or {}).get("configurations") or [] if isinstance(c, dict)]


def speed(run: RunData, page: dict[str, Any]) -> None:
    if run.bench is None:
        return
    rows, points = [], []
    for configuration in _configurations(run):
        if configuration.get("status") == "crashed" and not configuration.get("cells"):
            error = (configuration.get("errors") or [{}])[0].get("error", "")
            rows.append([configuration["name"], f"crashed: {error}", "-", "-", "-", "-"])
        for cell in configuration.get("cells") or []:
            ratio = cell.get("speedup") or {}
            if ratio.get("median") is not None:
                label = f"{configuration['name']}\n{cell.get('label', '')}"
                points.append(Point(label, 0, ratio["median"], ratio.get("low"), ratio.get("high")))
            ttft, itl = cell.get("ttft_seconds") or {}, cell.get("itl_seconds") or {}
            rows.append(
                [configuration["name"], str(cell.get("label", "-")), _spread(ratio, "x"),
                 _spread(cell.get("tokens_per_second"), ""), _ms(ttft.get("p50")), _ms(itl.get("p50"))]
            )  # fmt: skip
    floor = _floor(run.bench)
    if rows:
        page["tables"]["speed"] = Table(
            ["configuration", "work", "speed-up (95 %)", "tokens/s", "first token", "between tokens"], rows,
            f"Speed-up: dense wall time / own, pairs in one run. Dense is: {run.bench.get('baseline', 'dense')}."
            + (f" {floor}" if floor else ""),
        )  # fmt: skip
    if points:
        page["figures"]["speed"] = plots.speed_figure(points)
    machine = run.bench.get("machine") or {}
    gpus = ", ".join(str(gpu.get("name")) for gpu in machine.get("gpus") or [])
    page["machine"] = ", ".join(str(x) for x in (machine.get("cpu"), gpus) if x)


def _floor(bench: dict[str, Any]) -> str:
    """The least time a step can take, where the benchmark says it."""
    found = bench.get("floor") or (bench.get("subject") or {}).get("floor")
    if isinstance(found, dict):
        found = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in found.items())
    return f"Floor (weights read once per step): {found}." if found else ""


def heat(run: RunData, page: dict[str, Any]) -> None:
    if run.tokens is None:
        return
    tokens = run.tokens
    count = tokens["num_layers"]
    highest = max((t["entropy"] for t in tokens["tokens"]), default=1.0) or 1.0
    limits = _limits(tokens)
    rows = []
    for token in tokens["tokens"]:
        risk = _telling(token, limits, tokens.get("value"), count)
        rows.append(
            {
                "text": token["text"], "skip": round(token["skipped"] / count, 3),
                "early": round(1 - token["exit_layer"] / count, 3), "bits": round(token["entropy"] / highest, 3),
                "changed": 0 if token["agrees"] else 1,
                "facts": [token["skipped"], token["exit_layer"], token["entropy"], token.get("p"), token.get("p_dense"),
                          1 if token["agrees"] else 0, risk, token["layers"]],
            }
        )  # fmt: skip
    source = tokens.get("text") or {}
    page["heat"] = {
        "rows": rows, "layers": count, "gate": tokens.get("gate"), "value": tokens.get("value") or "risk",
        "skip_ratio": tokens.get("skip_ratio"), "highest": highest,
        "agreement": sum(t["agrees"] for t in tokens["tokens"]) / max(1, len(tokens["tokens"])),
        "source": " ".join(str(source[k]) for k in ("dataset", "split", "file") if source.get(k)),
    }  # fmt: skip


def _telling(token: dict[str, Any], limits: dict[int, float], kind: str | None, count: int) -> list[Any] | None:
    """[layer, value, limit] of the decision that mattered: where the token left, or where it came closest."""
    values = {int(layer): value for layer, value in token["values"].items()}
    if not values:
        return None
    if token["exit_layer"] < count:
        at = max((layer for layer in values if layer <= token["exit_layer"]), default=min(values))
    else:
        sign = -1 if kind == "score" else 1
        at = min(values, key=lambda layer: sign * (values[layer] - limits.get(layer, 0.0)))
    return [at, values[at], limits.get(at)]


def provenance(run: RunData, page: dict[str, Any]) -> None:
    commands = []
    if run.manifest is not None:
        page["versions"] = next((s.versions for s in run.manifest.steps.values()), {})
        for step in run.manifest.steps.values():
            line = shlex.join(step.command)
            if line not in commands:
                commands.append(line)
    if run.validation is not None:
        report = run.validation["report"]
        text = report.get("text") or {}
        told = ["sedac", "validate", "--model", report["model"]["ref"], "--data-dir", str(run.folder)]
        for name, option in (
            ("dataset", "--dataset"),
            ("split", "--split"),
            ("samples", "--samples"),
            ("max_length", "--max-length"),
        ):
            if text.get(name) is not None:
                told += [option, str(text[name])]
        commands.append(shlex.join(told))
        page.setdefault("versions", run.validation.get("versions") or {})
    if run.bench is not None and run.bench.get("command"):
        commands.append(shlex.join(map(str, run.bench["command"])))
    commands.append(shlex.join(["sedac", "report", str(run.folder)]))
    page["commands"] = commands
    if run.manifest is not None:
        files = [(name, digest) for step in run.manifest.steps.values() for name, digest in step.files.items()]
        page["tables"]["files"] = Table(["file", "sha256"], [[name, digest[:16]] for name, digest in files])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _spread(value: dict[str, Any] | None, unit: str) -> str:
    if not value or value.get("median") is None:
        return "-"
    digits = 3 if unit else 1
    text = f"{value['median']:.{digits}f}{unit}"
    if value.get("low") is not None:
        text += f" ({value['low']:.{digits}f} .. {value['high']:.{digits}f})"
    return text


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value * 1000:.1f} ms"
