"""`distill --ghost-kv` as the command runs it: text in, `ghost_kv.pth` and the measured comparison out.

report = distill_ghost(loaded, text, GhostOptions(layers=(18, 19, 20), minutes=2), Path("sedac_data/ghost_kv.pth"))
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sedac_cli.artifacts.files import folder_lock, make_folder, plain
from sedac_cli.config import TextSpec
from sedac_cli.errors import UsageError
from sedac_cli.gates.base import Gate, Guards
from sedac_cli.gates.span import SpanGate
from sedac_cli.models import LoadedModel
from sedac_cli.pipeline import Progress, quiet_progress
from sedac_cli.pipeline.distill.ghost import GhostOptions, GhostTrainer
from sedac_cli.pipeline.distill.ghost_compare import Compared, compare, mlps_at_equal_cost
from sedac_cli.pipeline.distill.given import GivenOptions, GivenTrainer, as_standins
from sedac_cli.pipeline.distill.run import open_state, read_windows, split
from sedac_cli.pipeline.world import World
from sedac_cli.runtime.plan import make_plan
from sedac_cli.standins import StandIn


@dataclass(frozen=True)
class GhostReport:
    file: Path
    gate: str
    layers: list[int]
    steps: int
    tokens: int
    seconds: float
    cost_share: float
    """FLOPs of the ghosts, of those of the layers they stand for."""
    held_windows: int
    comparison: list[Compared]


def distill_ghost(
    loaded: LoadedModel, text: TextSpec, options: GhostOptions, out: Path, resume: bool = False,
    progress: Progress = quiet_progress, world: World | None = None,
) -> GhostReport:  # fmt: skip
    from sedac_cli.costs import model_costs

    world = world or World()
    if world.main:
        make_folder(out.parent)
    coded = Guards(sinks=options.sinks) if options.gate.startswith(("random:", "always:")) else None
    gate = make_plan(options.gate, loaded.decoder, loaded.identity, seed=options.seed, guards=coded).gate
    held, train = split(read_windows(text, loaded.tokenizer), options.seed)
    trainer = GhostTrainer(loaded, train, options, gate, open_state(out, resume, world), progress, world)
    begun = copy.deepcopy(trainer.ghost)
    mlps = mlps_at_equal_cost(loaded, begun, options.rank, text.max_length)[0]
    if options.rival and min(mlps) < options.layers[0]:
        raise UsageError(
            f"--rival: there are not enough MLPs from layer {options.layers[0]} on to save as much as "
            f"{len(options.layers)} whole layers",
            hint="fewer --skip-layers, or shallower ones",
        )
    trainer.run()
    rival = _rival(trainer, tuple(sorted(mlps)), train, gate, progress) if options.rival else None
    rows: list[Compared] = []
    if world.main:
        rows = compare(loaded, held, trainer.sample(), gate, begun, trainer.ghost, options.rank, seed=options.seed,
                       rival=rival)  # fmt: skip
        recipe = trainer.recipe(text, comparison=plain(rows))
        with folder_lock(out.parent):
            trainer.ghost.save(out, loaded.identity, recipe)
        out.with_suffix(".training.pt").unlink(missing_ok=True)
    costs = model_costs(loaded.decoder, text.max_length)
    spent = sum(trainer.ghost.cost_per_token(x) for x in options.layers)
    share = spent / sum(costs.mlp[x] + costs.mixer[x] for x in options.layers)
    return GhostReport(
        out,
        options.gate,
        list(options.layers),
        trainer.step,
        trainer.tokens(text),
        trainer.elapsed,
        share,
        len(held),
        rows,
    )


def _rival(trainer: GhostTrainer, mlps: tuple[int, ...], train: Tensor, gate: Gate, progress: Progress) -> StandIn:
    """Stand-ins for MLPs skipped by the tokens that the same gate sends away, at equal cost, trained as long."""
    options = trainer.options
    told = GivenOptions(
        gate=options.gate, rank=options.rank, steps=options.steps, minutes=options.minutes, lr=options.lr,
        batch_size=options.batch_size, seed=options.seed,
    )  # fmt: skip
    given = GivenTrainer(trainer.loaded, train, told, SpanGate(gate, mlps), None, progress, trainer.world)
    given.run()
    return as_standins(dict(given.standins))
