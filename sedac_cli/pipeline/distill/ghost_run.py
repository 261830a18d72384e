"""`distill --ghost-kv` as the command runs it: text in, `ghost_kv.pth` and the measured comparison out.

report = distill_ghost(loaded, text, GhostOptions(layers=(18, 19, 20), minutes=2), Path("sedac_data/ghost_kv.pth"))
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path

from sedac_cli.artifacts.files import folder_lock, make_folder, plain
from sedac_cli.artifacts.manifest import versions
from sedac_cli.config import TextSpec
from sedac_cli.gates.base import Guards
from sedac_cli.models import LoadedModel
from sedac_cli.pipeline import Progress, quiet_progress
from sedac_cli.pipeline.distill.ghost import GhostOptions, GhostTrainer
from sedac_cli.pipeline.distill.ghost_compare import Compared, compare
from sedac_cli.pipeline.distill.run import open_state, read_windows, split
from sedac_cli.pipeline.world import World
from sedac_cli.runtime.plan import make_plan


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
    trainer.run()
    tokens = trainer.step * options.batch_size * text.max_length * world.size
    rows: list[Compared] = []
    if world.main:
        rows = compare(loaded, held, trainer.sample(), gate, begun, trainer.ghost, options.rank, seed=options.seed)
        recipe = {
            "options": asdict(options), "text": asdict(text), "steps": trainer.step, "tokens": tokens,
            "seconds": trainer.elapsed, "history": trainer.history, "comparison": plain(rows), "processes": world.size,
            "versions": versions(),
        }  # fmt: skip
        with folder_lock(out.parent):
            trainer.ghost.save(out, loaded.identity, recipe)
        out.with_suffix(".training.pt").unlink(missing_ok=True)
    costs = model_costs(loaded.decoder, text.max_length)
    spent = sum(trainer.ghost.cost_per_token(x) for x in options.layers)
    share = spent / sum(costs.mlp[x] + costs.mixer[x] for x in options.layers)
    return GhostReport(
        out, options.gate, list(options.layers), trainer.step, tokens, trainer.elapsed, share, len(held), rows
    )
