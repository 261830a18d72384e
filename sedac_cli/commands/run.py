"""`sedac run`: the whole pipeline from one YAML, each step done once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sedac_cli.commands._common import sedac_command
from sedac_cli.commands._pipeline import build_steps, sentence
from sedac_cli.console import Output, on_interrupt
from sedac_cli.errors import InputError, PromiseMissedError, UsageError


@sedac_command()
def run(
    out: Output,
    seed: int,
    file: Annotated[Path, typer.Argument(help="YAML: shared options, and a section per step.", metavar="CONFIG.yaml")],
    save_dir: Annotated[
        Path | None, typer.Option("--save-dir", help="The run's folder; default: save-dir of the file, or sedac_run.")
    ] = None,
    force: Annotated[
        list[str] | None, typer.Option("--force", help="Do this step again though nothing has changed; repeatable.")
    ] = None,
) -> None:
    """Run the steps a YAML names: collect, train-probes, distill, calibrate, validate, bench, and a report at the end.

    A step whose options and inputs have not changed is not run again. A missed limit ends in exit code 1, after the report.
    """
    from sedac_cli.pipeline.steps import run_steps

    config = read_config(file)
    named = config.pop("save-dir", config.pop("save_dir", None))
    own_seed = config.pop("seed", None)
    if own_seed is not None and not (isinstance(own_seed, int) and not isinstance(own_seed, bool) and own_seed >= 0):
        raise UsageError(f"{file}: seed is {own_seed!r}, expected a whole number")
    folder = save_dir or Path(str(named or "sedac_run"))
    steps = build_steps(config, folder, str(file), seed or own_seed or 0, out.quiet)
    on_interrupt("the same command again; finished steps are kept")
    outcomes = run_steps(folder, steps, "run", force or [], out.note)
    out.table(
        f"{file} -> {folder}",
        ["step", "", "found", "seconds"],
        [[o.name, "kept" if o.kept else "done", o.missed or sentence(o), f"{o.seconds:.0f}"] for o in outcomes],
    )
    out.result({"folder": folder, "steps": outcomes})
    missed = [f"{o.name}: {o.missed}" for o in outcomes if o.missed]
    if missed:
        raise PromiseMissedError("; ".join(missed), hint=f"{folder / 'report.html'} shows by how much")


def read_config(path: Path) -> dict[str, Any]:
    import yaml

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(document, dict):
        raise InputError(f"{path}: expected a section per step, found {type(document).__name__}")
    return document
