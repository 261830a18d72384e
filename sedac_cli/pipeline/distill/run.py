"""`distill` as the command runs it: text in, `sedac_gates.pth` with its measured curve out.

report = distill(loaded, text, DistillOptions(minutes=8), Path("sedac_data/sedac_gates.pth"))
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sedac_cli.artifacts.files import folder_lock, make_folder
from sedac_cli.artifacts.gates_file import GatesFile
from sedac_cli.config import TextSpec
from sedac_cli.corpus import Corpus
from sedac_cli.errors import InputError
from sedac_cli.models import LoadedModel
from sedac_cli.pipeline import Progress, quiet_progress
from sedac_cli.pipeline.distill.curve import measure_curve
from sedac_cli.pipeline.distill.loop import exported
from sedac_cli.pipeline.distill.train import DistillOptions, LatchRouter, Trainer
from sedac_cli.pipeline.world import World

HELD_SHARE, MAX_HELD = 0.05, 192


@dataclass(frozen=True)
class DistillReport:
    file: Path
    gate: str
    layers: list[int]
    steps: int
    tokens: int
    seconds: float
    curve: list[dict[str, float]]
    harm: dict[int, float]
    standin_cost: float
    ranks: dict[int, int]


def read_windows(text: TextSpec, tokenizer: Any) -> Tensor:
    """Full windows of token ids [N, T], int32."""
    rows = [s for s in Corpus(text, tokenizer).samples() if len(s) == text.max_length]
    if len(rows) < 20:
        raise InputError(
            f"{text.dataset} gives {len(rows)} full samples of {text.max_length} tokens; distillation needs at least 20",
            hint="more text, or a smaller --max-length",
        )
    return torch.tensor(rows, dtype=torch.int32)


def split(windows: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """(held out for the figures, to train on)."""
    held = min(MAX_HELD, max(4, round(HELD_SHARE * len(windows))))
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:held]], windows[order[held:]]


def open_state(out: Path, resume: bool, world: World) -> Path:
    """Where the training stands is written to; what an earlier run left is gone for all processes unless resumed."""
    state = out.with_suffix(".training.pt")
    if not resume and world.main:
        state.unlink(missing_ok=True)
    world.wait()
    return state


def distill(
    loaded: LoadedModel, text: TextSpec, options: DistillOptions, out: Path, resume: bool = False,
    progress: Progress = quiet_progress, world: World | None = None,
) -> DistillReport:  # fmt: skip
    world = world or World()
    if world.main:
        make_folder(out.parent)
    held, train = split(read_windows(text, loaded.tokenizer), options.seed)
    state = open_state(out, resume, world)
    trainer = Trainer(loaded, train, options, state, progress, world)
    trainer.run()
    curve = measure_curve(trainer, held) if world.main else []
    standins = {layer: exported(module, torch.bfloat16) for layer, module in trainer.standins.items()}
    routers = {
        layer: exported(module.probe if isinstance(module, LatchRouter) else module)
        for layer, module in trainer.routers.items()
    }
    recipe = trainer.recipe(text, harm=trainer.harm, ranks=trainer.ranks)
    if world.main:
        with folder_lock(out.parent):
            GatesFile(options.gate, loaded.identity, options.sinks, routers, standins, curve, recipe).write(out)
        state.unlink(missing_ok=True)
    shares = [trainer.standins[x].flops() / _mlp_flops(loaded, x) for x in trainer.layers]  # type: ignore[operator]
    return DistillReport(
        out,
        options.gate,
        list(trainer.layers),
        trainer.step,
        trainer.tokens(text),
        trainer.elapsed,
        curve,
        trainer.harm,
        sum(shares) / len(shares),
        trainer.ranks,
    )


def _mlp_flops(loaded: LoadedModel, layer: int) -> float:
    from sedac_cli.costs import branch_flops

    return branch_flops(loaded.decoder.branches[layer].entry, loaded.model.config.get_text_config())
