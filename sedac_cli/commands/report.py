"""`sedac report`: what a run folder holds, as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sedac_cli.commands._common import option, sedac_command
from sedac_cli.config import ModelSpec
from sedac_cli.console import Output
from sedac_cli.errors import InputError, UsageError

MODEL = ModelSpec(ref="")


@sedac_command(model=MODEL)
def report(
    out: Output,
    seed: int,
    model: ModelSpec,
    run_dir: Annotated[Path, typer.Argument(help="Folder with validate.json, thresholds.json, bench.json, ...")],
    gate: Annotated[
        str | None, option("Heat map", "--gate", help="Gate to show on the text; default: the folder's.")
    ] = None,
    sample: Annotated[
        str | None, option("Heat map", "--text", help="A file or the words themselves; default: the validation text.")
    ] = None,
    tokens: Annotated[int, option("Heat map", "--tokens", min=2, max=20000, help="How many tokens of it.")] = 400,
    redraw: Annotated[
        bool, option("Heat map", "--redraw", help="Only draw: the model is not run, tokens.json is taken as it is.")
    ] = False,
    out_file: Annotated[
        Path | None, typer.Option("--out", help="HTML file; default report.html in the folder.")
    ] = None,
) -> None:
    """Make one self-contained HTML page: the promise and whether it held, the curve, the text token by token, speed."""
    if redraw and (gate or sample or model != MODEL):
        raise UsageError("--redraw does not run the model: --model, --gate and --text do not go with it")
    needed = report_needs()
    if needed:
        raise InputError(f"sedac report needs {needed}", hint="pip install 'sedac[report]'")
    from sedac_cli.report.make import ReportOptions, make_report

    chosen = model if model.ref else None
    if chosen is None and model != MODEL:
        raise UsageError("options of the model go with --model", hint="--model builtin:tiny")
    made = make_report(run_dir, ReportOptions(chosen, gate, sample, tokens, redraw, out_file, seed))
    for problem in made.problems:
        out.note(f"note: {problem}")
    for what, command in made.missing:
        out.note(f"not in the report: {what} ({command})")
    out.text(f"wrote {made.file}")
    out.result(made)


def report_needs() -> str | None:
    """The package that a report lacks here."""
    from importlib.util import find_spec

    return next((name for name in ("matplotlib", "jinja2") if find_spec(name) is None), None)
