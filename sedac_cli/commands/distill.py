"""`sedac distill`: learn which MLPs each token can do without, and what stands in for them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sedac_cli.commands._common import option, sedac_command
from sedac_cli.config import ModelSpec, TextSpec, parse_layers
from sedac_cli.console import Output, on_interrupt


@sedac_command(model=ModelSpec(), text=TextSpec(samples=20000))
def distill(
    out: Output,
    seed: int,
    model: ModelSpec,
    text: TextSpec,
    gate: Annotated[
        str, typer.Option("--gate", help="learned: a router per layer. cascade: the latch form.")
    ] = "learned",
    target_skip: Annotated[float, typer.Option("--target-skip", help="Share of all MLPs to skip.")] = 0.25,
    rank: Annotated[int, typer.Option("--rank", min=2, help="Width of the stand-ins.")] = 48,
    layers: Annotated[
        str, typer.Option("--layers", help="Layers that may skip; auto: by a scan of their harm.")
    ] = "auto",
    checkpoints: Annotated[
        str | None, typer.Option("--checkpoints", help="Gate cascade: where it decides; default every second layer.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Training steps.")] = None,
    minutes: Annotated[float | None, typer.Option("--minutes", min=0.01, help="Training time, if not --steps.")] = None,
    batch_size: Annotated[int, option("Training", "--batch-size", min=1, help="Samples per step and process.")] = 16,
    lr: Annotated[float, option("Training", "--lr", min=1e-8, help="Peak learning rate of the stand-ins.")] = 2e-3,
    router_lr: Annotated[float, option("Training", "--router-lr", min=1e-8, help="Peak rate of the routers.")] = 3e-4,
    router_width: Annotated[
        int, option("Training", "--router-width", min=0, help="Hidden units of a router; 0 is linear.")
    ] = 16,
    noise: Annotated[
        float, option("Training", "--noise", min=0, help="Noise on the scores at the start of training.")
    ] = 1.0,
    spread: Annotated[
        float, option("Training", "--spread", min=0, max=1, help="Share of samples trained at budgets off the target.")
    ] = 0.5,
    sinks: Annotated[int, option("Guards", "--sinks", min=0, help="First positions that never skip.")] = 4,
    compile: Annotated[bool, option("Training", "--compile/--no-compile", help="torch.compile the layers.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted distillation.")] = False,
    save: Annotated[Path, typer.Option("--save", help="File to write.")] = Path("sedac_data/sedac_gates.pth"),
) -> None:
    """Train routers and stand-ins by KL to the dense model, backbone frozen; one file serves a range of budgets."""
    from sedac_cli.models import load_model
    from sedac_cli.pipeline.distill.run import distill as run
    from sedac_cli.pipeline.distill.train import DistillOptions
    from sedac_cli.pipeline.world import World

    on_interrupt("the same command with --resume")
    if steps is None and minutes is None:
        minutes = 5.0
    options = DistillOptions(
        gate=gate, target_skip=target_skip, rank=rank, steps=steps, minutes=minutes, batch_size=batch_size, lr=lr,
        layers=None if layers == "auto" else tuple(parse_layers(layers)),
        checkpoints=tuple(parse_layers(checkpoints)) if checkpoints else None,
        router_lr=router_lr, router_width=router_width, noise=noise, spread=spread, sinks=sinks, seed=seed, compile=compile,
    )  # fmt: skip
    world = World.join()
    report = run(load_model(world.place(model)), text, options, save, resume, out.progress(), world)
    if not report.curve:
        return
    cost = report.standin_cost
    out.table(
        f"{gate} gates and stand-ins -> {save}",
        ["MLPs skipped", "net of stand-ins", "ppl ratio", "agreement", "KL (nats)"],
        [
            [f"{r['share']:.1%}", f"{r['share'] * (1 - cost):.1%}", f"{r['ppl_ratio']:.4f}", f"{r['agreement']:.4f}",
             f"{r['kl']:.4f}"]
            for r in report.curve
        ],
        caption=f"on held-out windows of the training text; {report.steps} steps, {report.tokens:,} tokens, "
        f"{report.seconds / 60:.1f} minutes; a stand-in costs {cost:.1%} of an MLP. "
        f"Use: --gate {gate}:{save}@{target_skip}",
    )  # fmt: skip
    out.result(report)
