"""`sedac collect`: hidden states and labels for the probes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sedac_cli.commands._common import option, sedac_command
from sedac_cli.config import ModelSpec, TextSpec, parse_layers
from sedac_cli.console import Output, on_interrupt
from sedac_cli.errors import UsageError


@sedac_command(model=ModelSpec(ref="Qwen/Qwen2.5-3B-Instruct"), text=TextSpec(dataset="wikitext"))
def collect(
    out: Output,
    model: ModelSpec,
    text: TextSpec,
    layers: Annotated[str, typer.Option("--layers", help="Checkpoint layers, counted from 0, rising.")] = "7,14,21",
    save_dir: Annotated[Path, typer.Option("--save-dir", help="Folder for the files.")] = Path("sedac_data"),
    target: Annotated[
        str,
        typer.Option(
            "--target",
            help="Label: final entropy, logit-lens entropy at the layer, or harm (KL of skipping from there on).",
        ),
    ] = "final",
    batch_size: Annotated[int, option("Text", "--batch-size", min=1, help="Samples per forward pass.")] = 8,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Run a model over text; keep the hidden states entering the checkpoint layers and a label per token."""
    if target not in ("final", "lens", "harm"):
        raise UsageError(f"--target: '{target}' is not known", hint="final, lens or harm")
    from sedac_cli.pipeline.collect import CollectOptions
    from sedac_cli.pipeline.collect import collect as run

    on_interrupt("the same command with --resume")
    options = CollectOptions(
        layers=tuple(parse_layers(layers)),
        save_dir=save_dir,
        target=target,  # type: ignore[arg-type]
        batch_size=batch_size,
        resume=resume,
        overwrite=overwrite,
    )
    report = run(options, model, text, out.progress())
    if not report.files:
        return
    out.table(
        f"collected {report.tokens:,} tokens of {report.sequences:,} samples into {save_dir}",
        ["layer", "states", f"mean label ({report.label_unit})", "labels"],
        [
            [layer, f"hidden_states_layer{layer}.pt", f"{mean:.3f}", f"entropies_layer{layer}.pt"]
            for layer, mean in report.label_mean.items()
        ],
        caption=f"label: {target}; {report.tokens_per_second:,.0f} tokens/s; {report.set_aside} samples set aside",
    )
    out.result(report)
