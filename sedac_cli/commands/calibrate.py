"""`sedac calibrate`: risks in, thresholds out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sedac_cli.commands._common import option, sedac_command
from sedac_cli.config import parse_layers, parse_rates
from sedac_cli.console import Output
from sedac_cli.errors import UsageError


@sedac_command()
def calibrate(
    out: Output,
    data_dir: Annotated[Path, typer.Option("--data-dir", help="Folder with collected states and probes.")] = Path(
        "sedac_data"
    ),
    layers: Annotated[str | None, typer.Option("--layers", help="Checkpoints to use; all if left out.")] = None,
    target_exit_rate: Annotated[
        str | None,
        typer.Option(
            "--target-exit-rate", help="Share that exits at each checkpoint, of those that reach it: 0.2,0.6,0.9."
        ),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option("--strategy", help="conservative, balanced (default) or aggressive: 10, 15, 25 % of tokens exit."),
    ] = None,
    batch_rule: Annotated[
        str, typer.Option("--batch-rule", help="token: each for itself; max: a step exits only as a whole.")
    ] = "token",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Sequences per step, for rule max.")] = 8,
    sinks: Annotated[int, option("Guards", "--sinks", min=0, help="First positions that never skip.")] = 4,
    protect_first: Annotated[int, option("Guards", "--protect-first", min=0, help="First layers that never skip.")] = 0,
    protect_last: Annotated[int, option("Guards", "--protect-last", min=0, help="Last layers that never skip.")] = 0,
    prefill: Annotated[bool, option("Guards", "--prefill/--no-prefill", help="Skip in the prompt too.")] = True,
    out_file: Annotated[
        Path | None, typer.Option("--out", help="Thresholds file; default thresholds.json in the data folder.")
    ] = None,
) -> None:
    """Choose thresholds so that a wanted share of tokens exits at each checkpoint."""
    if target_exit_rate and strategy:
        raise UsageError("--target-exit-rate and --strategy are two ways to say the same thing: give one")
    if batch_rule not in ("token", "max"):
        raise UsageError(f"--batch-rule: '{batch_rule}' is not known", hint="token or max")
    from sedac_cli.gates.base import Guards
    from sedac_cli.pipeline.calibrate import CalibrateOptions
    from sedac_cli.pipeline.calibrate import calibrate as run

    options = CalibrateOptions(
        layers=tuple(parse_layers(layers)) if layers else None,
        rates=tuple(parse_rates(target_exit_rate, "target-exit-rate")) if target_exit_rate else None,
        strategy=strategy,
        batch_rule=batch_rule,  # type: ignore[arg-type]
        batch_size=batch_size,
        guards=Guards(sinks=sinks, first=protect_first, last=protect_last, prefill=prefill),
        out=out_file,
    )
    report = run(data_dir, options)
    unit = report.label_unit
    out.table(
        f"{report.gate} thresholds on {report.tokens:,} tokens -> {report.file}",
        ["layer", "threshold", "target rate", "exit rate", "reached", f"label of exited ({unit})", f"of kept ({unit})"],
        [
            [c.layer, f"{c.threshold:.4f}", f"{c.target_rate:.1%}", f"{c.exit_rate:.1%}", f"{c.reached:,}",
             f"{c.exited_label:.3f}", f"{c.kept_label:.3f}"]
            for c in report.checkpoints
        ],
        caption=(
            f"{report.exited_share:.1%} of tokens exit, {report.mlp_skip_ratio:.1%} of MLPs skipped, on collected states. "
            "An exit rate promises nothing about quality: run `sedac validate`."
        ),
    )  # fmt: skip
    out.result(report)
