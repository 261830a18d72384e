"""From the files of a run to what the page shows: figures, tables, sentences. Every part is optional; none is invented.

page = build_page(read_run(folder)); page["figures"]["ppl"]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sedac_cli import __version__
from sedac_cli.artifacts.thresholds import Promise
from sedac_cli.report import plots
from sedac_cli.report.explain import gate_sentence
from sedac_cli.report.plots import Line, Point
from sedac_cli.report.provenance import provenance
from sedac_cli.report.sources import RunData
from sedac_cli.report.speed import speed
from sedac_cli.report.table import Table, interval, number, share
from sedac_cli.report.verdict import verdict


def build_page(run: RunData) -> dict[str, Any]:
    """What the template is filled with. A section that cannot be made of damaged data is left out and named."""
    page: dict[str, Any] = {
        "version": __version__, "folder": run.folder.resolve().name, "model": run.model_ref, "gate": _gate(run),
        "verdict": verdict(run), "problems": list(run.problems), "missing": run.missing, "figures": {}, "tables": {},
        "heat": None, "random_weights": _random_weights(run),
        "gate_told": gate_sentence(_gate(run)),
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
        label = report["gate"] if len(run.validations) == 1 else f"{report['gate']} ({name})"
        saved = report.get("reality", {}).get("compute_saved")
        rows.append(_quality_row(label, report["measures"], report["intervals"], saved, report["predicted_tokens"]))
    for configuration in run.configurations:
        quality = configuration.get("quality") or {}
        if quality.get("measures"):
            label = f"bench: {configuration['name']}"
            rows.append(_quality_row(label, quality["measures"], quality.get("intervals") or {}, None, None))
    if rows:
        page["tables"]["quality"] = Table(
            ["gate", "MLPs skipped", "compute saved", "ppl ratio", "95 %", "agreement", "95 %", "KL, nats", "tokens"], rows,
            "Compute saved is a share of the whole model's arithmetic, with gates and stand-ins as cost; it is no clock.",
        )  # fmt: skip


def _quality_row(
    label: str, m: dict[str, Any], spans: dict[str, Any], saved: float | None, tokens: int | None
) -> list[str]:
    return [
        label, share(m["skip_ratio"]), share(saved), number(m["ppl_ratio"]), interval(spans.get("ppl_ratio")),
        number(m["agreement"]), interval(spans.get("agreement")), number(m.get("kl")), "-" if tokens is None else f"{tokens:,}",
    ]  # fmt: skip


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
    for configuration in run.configurations:
        quality = configuration.get("quality") or {}
        m, span = quality.get("measures") or {}, (quality.get("intervals") or {}).get(key) or (None, None)
        if m.get(key) is not None and m.get("skip_ratio") is not None:
            points.append(Point(f"bench: {configuration['name']}", m["skip_ratio"], m[key], *span))
    return points


def layers(run: RunData, page: dict[str, Any]) -> None:
    if run.validation is None:
        cells = ((c["name"], cell) for c in run.configurations for cell in c.get("cells") or [])
        rates: dict[str, list[float]] = {}
        for name, cell in cells:
            if any(cell.get("skip_ratio_per_layer") or []):
                rates.setdefault(name, cell["skip_ratio_per_layer"])
        if rates:
            page["figures"]["layers"] = plots.layer_lines_figure(rates)
            page["layers_told"] = "Share of tokens that skip each layer's MLP, in the first work of each configuration."
        return
    report = run.validation["report"]
    simulated = report.get("simulation")
    page["figures"]["layers"] = plots.layers_figure(
        report["reality"]["skip_rates"], simulated and simulated["skip_rates"], "as the gate would on the dense model"
    )
    page["layers_told"] = "Share of tokens that skip each layer's MLP, on validation text."
    if simulated:
        page["layers_told"] += (
            " The line: what the gate decides on states of the dense model; where the bars differ, earlier skips have "
            "changed what later layers saw."
        )


def sensitivity(run: RunData, page: dict[str, Any]) -> None:
    promise = None if run.thresholds is None else run.thresholds.promise
    if promise is not None and promise.candidates:
        known = ("skip_ratio", "loss", "value", "p", "clipped_above", "neighbour_correlation", "certified")
        rows = []
        for row in promise.candidates:
            setting = ", ".join(f"{k} {v:g}" for k, v in row.items() if k not in known and isinstance(v, int | float))
            rows.append(
                [setting or "-", f"{row['skip_ratio']:.2%}", number(row["value"]), f"{row['p']:.3g}",
                 "certified" if row["certified"] else "not certified"]
            )  # fmt: skip
        page["tables"]["ladder"] = Table(
            ["setting", "MLPs skipped", str(promise.target.get("measure")), "p-value", ""], rows,
            "Tested from strict to loose on the calibration text, up to the first that fails.",
        )  # fmt: skip
    elif run.thresholds is not None and run.thresholds.found_by.get("checkpoints"):
        label = run.thresholds.target_label
        unit = "nats" if label == "harm" else "bits"
        page["tables"]["ladder"] = Table(
            ["layer", f"threshold on the risk, {unit}", "wanted to exit", "exit", f"mean {label}, exiting", f"mean {label}, staying"],
            [
                [str(c["layer"]), f"{c['threshold']:.4f}", share(c["target_rate"]), share(c["exit_rate"]),
                 number(c["exited_label"]), number(c["kept_label"])]
                for c in run.thresholds.found_by["checkpoints"]
            ],
            f"On the calibration text, of the tokens that reach the layer. The probe guesses {_told_label(label)}: it works as "
            "far as those that exit have less of it than the others.",
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


def _told_label(label: str) -> str:
    if label == "harm":
        return "the harm of skipping from its layer on (KL to the dense model's next-token distribution)"
    return f"the entropy of the next token ('{label}')"


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
                [[b["bin"], f"{b['tokens']:,}", share(b["skip_ratio"]), number(b["ppl_ratio"]), number(b["agreement"])]
                 for b in rows],
            ))
        )  # fmt: skip


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
