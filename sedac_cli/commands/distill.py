"""`sedac distill`: learn which MLPs each token can do without, and what stands in for them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sedac_cli.commands._common import option, sedac_command
from sedac_cli.config import ModelSpec, TextSpec, parse_layers, parse_span
from sedac_cli.console import Output, on_interrupt
from sedac_cli.errors import UsageError

if TYPE_CHECKING:
    from sedac_cli.pipeline.distill.ghost import GhostOptions
    from sedac_cli.pipeline.distill.given import GivenOptions
    from sedac_cli.pipeline.world import World


@sedac_command(model=ModelSpec(), text=TextSpec(samples=20000))
def distill(
    out: Output,
    seed: int,
    model: ModelSpec,
    text: TextSpec,
    gate: Annotated[
        str | None,
        typer.Option(
            "--gate",
            help="learned (default): a router per layer. cascade: the latch form. A gate as it is (soft:thresholds.json, "
            "stability:tau=0.9): only stand-ins are trained, for its choices. With --ghost-kv: who skips; random:0.3 if "
            "left out.",
        ),
    ] = None,
    target_skip: Annotated[float, typer.Option("--target-skip", help="Share of all MLPs to skip.")] = 0.25,
    rank: Annotated[int, typer.Option("--rank", min=2, help="Width of the stand-ins.")] = 48,
    rank_by: Annotated[
        str,
        typer.Option(
            "--rank-by", help="uniform: each layer the same. importance: the same total, where it removes harm."
        ),
    ] = "uniform",
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
    ghost_kv: Annotated[
        bool, option("Ghost KV", "--ghost-kv", help="Train K and V of tokens that skip whole layers instead.")
    ] = False,
    skip_layers: Annotated[
        str | None, option("Ghost KV", "--skip-layers", help="The layers skipped whole: 18..21.")
    ] = None,
    end_to_end: Annotated[
        float,
        option("Ghost KV", "--end-to-end", min=0, max=1, help="Share of the training that is KL of the whole model."),
    ] = 0.7,
    rival: Annotated[
        bool, option("Ghost KV", "--rival", help="Train stand-ins of MLPs skipped at equal cost as well, to compare.")
    ] = False,
    save: Annotated[
        Path | None,
        typer.Option("--save", help="File to write; default sedac_gates.pth or ghost_kv.pth in sedac_data."),
    ] = None,
) -> None:
    """Train routers and stand-ins by KL to the dense model, backbone frozen; one file serves a range of budgets."""
    if ghost_kv != (skip_layers is not None):
        raise UsageError("--ghost-kv and --skip-layers go together", hint="--ghost-kv --skip-layers 18..21")
    from sedac_cli.models import load_model
    from sedac_cli.pipeline.distill.run import distill as run
    from sedac_cli.pipeline.distill.train import TRAINED, DistillOptions
    from sedac_cli.pipeline.world import World

    on_interrupt("the same command with --resume")
    if steps is None and minutes is None:
        minutes = 5.0
    world = World.join()
    if ghost_kv or (gate or "learned") not in TRAINED:
        given_too = {"--compile": compile, "--layers": layers != "auto", "--checkpoints": checkpoints,
                     "--rank-by": rank_by != "uniform"}  # fmt: skip
        for name in (name for name, value in given_too.items() if value):
            raise UsageError(f"{name} goes with gates that are trained, not with {'--ghost-kv' if ghost_kv else gate}",
                             hint="--gate learned or --gate cascade")  # fmt: skip
    if ghost_kv:
        from sedac_cli.pipeline.distill.ghost import GhostOptions

        ghosts = GhostOptions(
            layers=parse_span(str(skip_layers)), gate=gate or "random:0.3", rank=rank, end_to_end=end_to_end, rival=rival, sinks=sinks,
            steps=steps, minutes=minutes, batch_size=batch_size, lr=lr, seed=seed,
        )  # fmt: skip
        distill_ghost_kv(out, model, text, ghosts, save or Path("sedac_data/ghost_kv.pth"), resume, world)
        return
    gate, save = gate or "learned", save or Path("sedac_data/sedac_gates.pth")
    if gate not in TRAINED:
        from sedac_cli.pipeline.distill.given import GivenOptions

        given = GivenOptions(
            gate=gate, rank=rank, steps=steps, minutes=minutes, batch_size=batch_size, lr=lr, seed=seed
        )
        distill_for_given(out, model, text, given, save, resume, world)
        return
    options = DistillOptions(
        gate=gate, target_skip=target_skip, rank=rank, rank_by=rank_by, steps=steps, minutes=minutes, batch_size=batch_size, lr=lr,
        layers=None if layers == "auto" else tuple(parse_layers(layers)),
        checkpoints=tuple(parse_layers(checkpoints)) if checkpoints else None,
        router_lr=router_lr, router_width=router_width, noise=noise, spread=spread, sinks=sinks, seed=seed,
        compile=compile,
    )  # fmt: skip
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


def distill_ghost_kv(
    out: Output, model: ModelSpec, text: TextSpec, options: GhostOptions, save: Path, resume: bool, world: World
) -> None:
    from sedac_cli.models import load_model
    from sedac_cli.pipeline.distill.ghost_run import distill_ghost

    report = distill_ghost(load_model(world.place(model)), text, options, save, resume, out.progress(), world)
    if not report.comparison:
        return
    count = report.comparison[0].tokens
    out.table(
        f"layers {options.layers[0]}..{options.layers[-1]} skipped whole by {options.gate} -> {save}",
        ["in their place", "FLOPs saved", "ppl ratio, following", "agreement", "KL (nats)", "ppl ratio, away", "all"],
        [
            [r.way, f"{r.flops_saved:.2%}", f"{r.ppl_ratio['following']:.4f}", f"{r.agreement['following']:.4f}",
             f"{r.kl['following']:.4f}", f"{r.ppl_ratio['away']:.4f}", f"{r.ppl_ratio['all']:.4f}"]
            for r in report.comparison
        ],
        caption=f"on {report.held_windows} held-out windows of the training text; the same tokens away in every row. "
        f"following: {count['following']:,} predictions of tokens that run after one that is away; away: "
        f"{count['away']:,} of those away. {report.steps} steps, {report.tokens:,} tokens, "
        f"{report.seconds / 60:.1f} minutes. Use: --gate ghost:{save}@{options.gate}",
    )  # fmt: skip
    out.result(report)


def distill_for_given(
    out: Output, model: ModelSpec, text: TextSpec, options: GivenOptions, save: Path, resume: bool, world: World
) -> None:
    from sedac_cli.models import load_model
    from sedac_cli.pipeline.distill.given_run import distill_given

    report = distill_given(load_model(world.place(model)), text, options, save, resume, out.progress(), world)
    if not report.ways:
        return
    out.table(
        f"stand-ins for gate {options.gate} -> {save}",
        ["a skipped MLP returns", "MLPs skipped", "ppl ratio", "agreement", "KL (nats)"],
        [
            [way, f"{r['share']:.1%}", f"{r['ppl_ratio']:.4f}", f"{r['agreement']:.4f}", f"{r['kl']:.4f}"]
            for way, r in report.ways.items()
        ],
        caption=f"on {report.held_windows} held-out windows of the training text, under the gate's own choices; "
        f"{report.steps} steps, {report.tokens:,} tokens, {report.seconds / 60:.1f} minutes; a stand-in costs "
        f"{report.standin_cost:.1%} of an MLP. Use: --gate {options.gate.partition(':')[0]}:{save}",
    )
    out.result(report)
