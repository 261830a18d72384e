"""`sedac train-probes`: hidden states in, one probe per layer out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sedac_cli.commands._common import sedac_command
from sedac_cli.config import parse_layers
from sedac_cli.console import Output, on_interrupt


@sedac_command()
def train_probes(
    out: Output,
    seed: int,
    data_dir: Annotated[Path, typer.Option("--data-dir", help="Folder that `sedac collect` wrote.")] = Path(
        "sedac_data"
    ),
    layers: Annotated[
        str | None, typer.Option("--layers", help="Which layers; all collected ones if left out.")
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Passes over the tokens.")] = 20,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Tokens per step.")] = 1024,
    rank: Annotated[int, typer.Option("--rank", min=1, help="Width inside the probe.")] = 64,
    lr: Annotated[
        float, typer.Option("--lr", min=1e-8, help="Base learning rate (one-cycle, peak four times this).")
    ] = 1e-3,
    holdout: Annotated[float, typer.Option("--holdout", min=0.01, max=0.9, help="Share of samples held out.")] = 0.1,
    bottom: Annotated[
        float, typer.Option("--bottom", min=0.01, max=0.99, help="Share of lowest labels the AUC is about.")
    ] = 0.2,
) -> None:
    """Train a probe per layer to tell safe tokens from risky ones."""
    from sedac_cli.pipeline.train_probes import TrainOptions
    from sedac_cli.pipeline.train_probes import train_probes as run

    on_interrupt("the same command again; nothing was written")
    chosen = tuple(parse_layers(layers)) if layers else None
    options = TrainOptions(chosen, epochs, batch_size, rank, lr, holdout, bottom, seed)
    report = run(data_dir, options, out.progress())
    rows = [
        [
            x.layer, f"{x.probe.spearman:.3f}", f"{x.linear.spearman:.3f}", f"{x.probe.mae:.3f}", f"{x.linear.mae:.3f}",
            f"{x.constant.mae:.3f}", f"{x.probe.auc:.3f}", f"{x.linear.auc:.3f}", x.best_epoch, x.file,
        ]
        for x in report.layers
    ]  # fmt: skip
    unit = report.label_unit
    out.table(
        f"probes on {report.test_tokens:,} held-out tokens (trained on {report.train_tokens:,})",
        ["layer", "Spearman", "linear", f"MAE ({unit})", "linear", "constant", f"AUC low {bottom:.0%}", "linear",
         "epoch", "file"],
        rows,
        caption=f"linear: ridge regression; constant: the median label, AUC 0.5; {report.seconds:.0f} s",
    )  # fmt: skip
    out.result(report)
