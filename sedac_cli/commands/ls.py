"""`sedac ls gates|models|datasets`: what there is to choose from, without a network."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from sedac_cli.commands._common import sedac_command
from sedac_cli.console import Output


class Kind(StrEnum):
    gates = "gates"
    models = "models"
    datasets = "datasets"


@sedac_command()
def ls(
    out: Output,
    what: Annotated[Kind, typer.Argument(help="gates with their options, built-in models, or built-in data sets.")],
) -> None:
    """List the gates and their options, the built-in models, or the built-in data sets."""
    {Kind.gates: list_gates, Kind.models: list_models, Kind.datasets: list_datasets}[what](out)


def list_gates(out: Output) -> None:
    from sedac_cli.gates.adaptive import AdaptiveThresholds
    from sedac_cli.gates.registry import GATES

    gates = [
        {"name": name, "form": gate.form, "summary": gate.summary, "options": [as_row(o) for o in gate.options]}
        for name, gate in GATES.items()
    ]
    adaptive = [as_row(o) for o in AdaptiveThresholds.options]
    out.table("Gates", ("gate", "written as", "what it does"), [(g["name"], g["form"], g["summary"]) for g in gates])
    rows = [(name, *row.values()) for name, options in options_of(gates, adaptive) for row in options]
    out.table(
        "Options",
        ("gate", "option", "default", "range", "meaning"),
        rows,
        caption="'adaptive' replaces the thresholds of fixed, cascade and soft by ones that keep an exit rate.",
    )
    out.result({"gates": gates, "adaptive": adaptive})


def options_of(gates: list[dict[str, Any]], adaptive: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    return [(gate["name"], gate["options"]) for gate in gates] + [("adaptive", adaptive)]


def as_row(option: Any) -> dict[str, Any]:
    return {
        "name": option.name,
        "default": option.shown_default,
        "range": option.range,
        "meaning": option.meaning,
    }


def list_models(out: Output) -> None:
    from sedac_cli.resources import builtin_models

    models = builtin_models()
    out.table(
        "Built-in models",
        ("model", "architecture", "layers", "hidden", "vocabulary", "MB"),
        [
            (m["name"], m["architecture"], m["layers"], m["hidden_size"], m["vocab_size"], f"{m['bytes'] / 1e6:.1f}")
            for m in models
        ],
        caption="--model also takes a local folder or a hub id.",
    )
    out.result({"models": models})


def list_datasets(out: Output) -> None:
    from sedac_cli.resources import builtin_texts

    texts = builtin_texts()
    out.table(
        "Built-in data sets",
        ("data set", "split", "MB"),
        [(t["name"], t["split"], f"{t['bytes'] / 1e6:.2f}") for t in texts],
        caption="--dataset also takes a .txt, .jsonl, .parquet or .csv file, a folder of them, or a hub name.",
    )
    out.result({"datasets": texts})
