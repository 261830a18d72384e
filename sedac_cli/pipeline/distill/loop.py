"""The training loop every distillation shares: steps or minutes, several processes, interruption.

Always true: what is random at a step depends on the seed and the step alone and is drawn for the whole batch, of which each
process takes its part. So an interrupted run ends as an uninterrupted one, and N processes as one with N times the batch.

    class Trainer(Loop): ...        # groups(), running(), compute(done), extra(), load_extra(state)
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sedac_cli.artifacts.manifest import versions
from sedac_cli.artifacts.tensors import load_tensors, save_tensors
from sedac_cli.config import TextSpec
from sedac_cli.errors import InputError, UsageError
from sedac_cli.models import LoadedModel
from sedac_cli.pipeline import Progress, quiet_progress
from sedac_cli.pipeline.world import World

log = logging.getLogger("sedac")

WARMUP_STEPS = 200


@dataclass(frozen=True)
class LoopOptions:
    """`batch_size` counts the samples of one process."""

    steps: int | None = None
    minutes: float | None = None
    batch_size: int = 16
    lr: float = 2e-3
    seed: int = 0
    compile: bool = False
    save_every: float = 120.0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise UsageError("give --steps or --minutes, one of them")


class Loop:
    """`figures` names what `compute` measures; the first of them is the loss."""

    figures = ("kl", "skipped")

    def __init__(
        self, loaded: LoadedModel, windows: Tensor, options: LoopOptions, state_file: Path | None = None,
        progress: Progress = quiet_progress, world: World | None = None,
    ):  # fmt: skip
        self.loaded, self.decoder, self.windows = loaded, loaded.decoder, windows
        self.settings = options
        self.state_file, self.progress, self.world = state_file, progress, world or World()
        self.device = loaded.device
        self.step, self.elapsed = 0, 0.0
        self.history: list[dict[str, float]] = []
        torch.manual_seed(options.seed)

    # What a kind of distillation brings ---------------------------------------------------------------------------

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups, each with its `peak` learning rate."""
        raise NotImplementedError

    def modules(self) -> dict[str, dict[int, nn.Module]]:
        """What is trained, by kind and layer: the state that is saved."""
        raise NotImplementedError

    def running(self) -> contextlib.AbstractContextManager[Any]:
        """Around all steps: the model in its training form."""
        raise NotImplementedError

    def compute(self, form: Any, done: float) -> Tensor:
        """Gradients of one batch; the figures [n], not yet averaged over processes."""
        raise NotImplementedError

    def extra(self) -> dict[str, Any]:
        return {}

    def load_extra(self, state: dict[str, Any]) -> None:
        pass

    # Draws --------------------------------------------------------------------------------------------------------

    def draw(self) -> Tensor:
        """This process's samples of the step's batch [B, T]; seeds whatever else is random in the step."""
        size, seed = self.settings.batch_size, self.settings.seed * 1_000_003 + self.step
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(len(self.windows), (size * self.world.size,), generator=generator)
        torch.manual_seed(seed)
        return self.windows[self.own(rows)].long().to(self.device)

    def own(self, whole: Tensor) -> Tensor:
        """This process's part of something with one entry per sample of the whole batch."""
        size = self.settings.batch_size
        return whole[self.world.rank * size : (self.world.rank + 1) * size]

    def sample(self, batches: int = 8) -> list[Tensor]:
        """This process's part of the first batches, for what is measured before training."""
        size, world = self.settings.batch_size, self.world
        count = max(1, min(batches * world.size, len(self.windows) // size))
        chosen = range(world.rank, count, world.size) if count >= world.size else [world.rank % count]
        return [self.windows[i * size : (i + 1) * size].long().to(self.device) for i in chosen]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    # The loop -----------------------------------------------------------------------------------------------------

    def parameters(self) -> list[nn.Parameter]:
        return [p for kind in self.modules().values() for module in kind.values() for p in module.parameters()]

    def run(self) -> None:
        options = self.settings
        parameters = self.parameters()
        for p in parameters:
            p.requires_grad_(True)
        fused = self.device.type == "cuda"
        optimizer = torch.optim.AdamW(self.groups(), lr=1.0, betas=(0.9, 0.98), weight_decay=0.0, fused=fused)
        self._resume(optimizer)
        self.world.share_first(p.data for p in parameters)
        began, saved = time.monotonic() - self.elapsed, time.monotonic()
        show = self.progress if self.world.main else quiet_progress
        with (
            self.running() as form,
            self._saved_when_interrupted(optimizer),
            show(total=options.steps or round(options.minutes or 0, 2), desc="distill",
                 initial=self.step if options.steps else round(self.elapsed / 60, 2),
                 unit="step" if options.steps else "min") as bar,
        ):  # fmt: skip
            while True:
                self.elapsed = time.monotonic() - began
                done = self._done()
                if done >= 1:
                    break
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * schedule(done) * min(1.0, (self.step + 1) / WARMUP_STEPS)
                figures = self.world.mean(self.compute(form, done)).tolist()
                if not math.isfinite(figures[0]):
                    raise InputError(f"the loss became {figures[0]} at step {self.step}", hint="a smaller --lr")
                self._reduce(parameters)
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                self.step += 1
                named = dict(zip(self.figures, figures, strict=True))
                if self.step % 20 == 0 or self.step == 1:
                    self.history.append({"step": self.step, **named, "seconds": self.elapsed})
                bar.update(1 if options.steps else (time.monotonic() - began - self.elapsed) / 60)
                bar.set_postfix_str(self.shown(named), refresh=False)
                if time.monotonic() - saved > options.save_every:
                    self._save(optimizer)
                    saved = time.monotonic()
        for p in parameters:
            p.requires_grad_(False)
        self._save(optimizer)

    def tokens(self, text: TextSpec) -> int:
        """Trained on so far, by all processes."""
        return self.step * self.settings.batch_size * text.max_length * self.world.size

    def recipe(self, text: TextSpec, **more: Any) -> dict[str, Any]:
        """How the file was made, as the file says it."""
        return {
            "options": asdict(self.settings), "text": asdict(text), "steps": self.step, "tokens": self.tokens(text),
            "seconds": self.elapsed, "history": self.history, **more, "processes": self.world.size, "versions": versions(),
        }  # fmt: skip

    def shown(self, figures: dict[str, float]) -> str:
        return f"KL {figures['kl']:.4f} nats, skipping {figures['skipped']:.1%}"

    def _done(self) -> float:
        if self.settings.steps:
            return self.step / self.settings.steps
        mine = torch.tensor([self.elapsed / (60 * (self.settings.minutes or 1))], device=self.device)
        return float(self.world.joined(mine).max())

    def _reduce(self, parameters: list[nn.Parameter]) -> None:
        if self.world.size > 1:
            # What one process had no use for in this step, another may have had.
            gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
            flat = self.world.mean(torch.cat([g.flatten() for g in gradients]))
            place = 0
            for p in parameters:
                p.grad = flat[place : place + p.numel()].view_as(p)
                place += p.numel()

    # Interruption -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _saved_when_interrupted(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            self._save(optimizer)
            raise

    def _save(self, optimizer: torch.optim.Optimizer) -> None:
        if self.state_file is None or not self.world.main:
            return
        modules = {kind: {layer: m.state_dict() for layer, m in by.items()} for kind, by in self.modules().items()}
        save_tensors(
            self.state_file,
            {
                "settings": self._comparable(),
                "step": self.step,
                "elapsed": self.elapsed,
                "modules": modules,
                "optimizer": optimizer.state_dict(),
                "history": self.history,
                "extra": self.extra(),
            },
        )

    def _comparable(self) -> dict[str, Any]:
        """What must be the same to go on: all but the length; the batch counts as a whole, however it is spread."""
        whole = {"batch_size": self.settings.batch_size * self.world.size}
        found = asdict(self.settings) | whole
        return {key: value for key, value in found.items() if key not in ("minutes", "steps", "save_every", "compile")}

    def _resume(self, optimizer: torch.optim.Optimizer) -> None:
        if self.state_file is not None and self.state_file.exists():
            state = load_tensors(self.state_file)
            now, before = self._comparable(), state.get("settings", {})
            changed = [key for key in now if now[key] != before.get(key)]
            if changed:
                raise InputError(
                    "cannot resume distillation with other settings: "
                    + "; ".join(f"{key} was {before.get(key)}, now {now[key]}" for key in changed)
                )
            self.step, self.elapsed, self.history = state["step"], state["elapsed"], state["history"]
            for kind, by in self.modules().items():
                for layer, module in by.items():
                    module.load_state_dict(state["modules"][kind][layer])
            optimizer.load_state_dict(state["optimizer"])
            self.load_extra(state["extra"])
            if self.world.main:
                log.info("resumed at step %d, %.1f minutes in", self.step, self.elapsed / 60)
        steps = self.world.joined(torch.tensor([self.step], device=self.device))
        if int(steps.min()) != int(steps.max()):
            raise InputError(
                f"the processes resume at different steps: {sorted(set(steps.tolist()))}",
                hint="--save in a folder that all machines share",
            )


def schedule(done: float) -> float:
    """A cosine from 1 to 2 %; the warm-up counts steps, because the first step of a compiled run takes a minute."""
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


def exported(module: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {key: value.detach().to("cpu", dtype).clone() for key, value in module.state_dict().items()}
