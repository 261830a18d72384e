"""Train routers and stand-ins by KL to the dense model, over a whole range of budgets at once.

Every sequence of a batch draws a share of MLPs to skip; its limit on the skip scores comes from running quantiles, so the
budget is met and the loss is KL alone. The backbone is frozen: with skipping off the model is bit-identical.

    trainer = Trainer(loaded, windows, DistillOptions(minutes=8)); trainer.run()
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sedac_cli.artifacts.tensors import load_tensors, save_tensors
from sedac_cli.errors import InputError, UsageError
from sedac_cli.gates.learned import Router
from sedac_cli.models import LoadedModel
from sedac_cli.pipeline import Progress, quiet_progress
from sedac_cli.pipeline.distill.blend import NEVER, Control, blended
from sedac_cli.pipeline.distill.budget import BudgetTable
from sedac_cli.pipeline.distill.loss import kl_loss
from sedac_cli.pipeline.distill.scan import gather, harm_scan, skippable, start
from sedac_cli.probes import LREProbe

log = logging.getLogger("sedac")

WARMUP_STEPS = 200


@dataclass(frozen=True)
class DistillOptions:
    gate: str = "learned"
    target_skip: float = 0.25
    rank: int = 48
    layers: tuple[int, ...] | None = None
    checkpoints: tuple[int, ...] | None = None
    steps: int | None = None
    minutes: float | None = None
    batch_size: int = 16
    lr: float = 2e-3
    router_lr: float = 3e-4
    router_width: int = 16
    spread: float = 0.5
    noise: float = 1.0
    sinks: int = 4
    seed: int = 0
    compile: bool = False
    save_every: float = 120.0

    def __post_init__(self) -> None:
        if self.gate not in ("learned", "cascade"):
            raise UsageError(f"--gate: '{self.gate}' cannot be distilled", hint="learned or cascade")
        if not 0 < self.target_skip < 1:
            raise UsageError(f"--target-skip: {self.target_skip} is not between 0 and 1")
        if (self.steps is None) == (self.minutes is None):
            raise UsageError("give --steps or --minutes, one of them")


class LatchRouter(nn.Module):
    """An LREProbe seen as a router: skip score = -(what goes into the softplus), so low risk is a high score."""

    def __init__(self, probe: LREProbe):
        super().__init__()
        self.probe = probe

    def forward(self, hidden: Tensor) -> Tensor:
        probe = self.probe
        return -probe.head(probe.norm(probe.proj(hidden.float()))).squeeze(-1)


class Trainer:
    def __init__(
        self, loaded: LoadedModel, windows: Tensor, options: DistillOptions, state_file: Path | None = None,
        progress: Progress = quiet_progress, accelerator: Any = None,
    ):  # fmt: skip
        self.loaded, self.decoder, self.windows, self.options = loaded, loaded.decoder, windows, options
        self.state_file, self.progress, self.accelerator = state_file, progress, accelerator
        self.device = loaded.device
        self.rank_index = accelerator.process_index if accelerator else 0
        torch.manual_seed(options.seed)
        self.generator = torch.Generator().manual_seed(options.seed * 7919 + self.rank_index)
        self.step, self.elapsed = 0, 0.0
        self.history: list[dict[str, float]] = []
        self._prepare()

    # Before ---------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Closed-form starts, the harm scan, and the layers that take part."""
        options, decoder = self.options, self.decoder
        sample = [self._batch_at(i) for i in range(min(8, len(self.windows) // options.batch_size or 1))]
        moments = gather(decoder, sample)
        standins = {layer: start(m, options.rank).to(self.device) for layer, m in moments.items()}
        self.harm = harm_scan(decoder, standins, sample[:2])
        latch = options.gate == "cascade"
        if latch:
            last = decoder.num_layers - 1
            points = options.checkpoints or tuple(range(decoder.num_layers // 4, last, 2))
            layers = tuple(range(points[0], last + 1 if self.harm[last] <= 6 * self._median_harm() else last))
            self.routers: dict[int, nn.Module] = {
                layer: LatchRouter(self._probe(moments[layer].tokens)) for layer in points
            }
        else:
            layers = options.layers or tuple(skippable(self.harm))
            self.routers = {layer: self._router(layer) for layer in layers}
        self.layers = layers
        for router in self.routers.values():
            router.to(self.device)
        self.standins: dict[int, nn.Module] = {layer: standins[layer] for layer in layers}
        self.table = BudgetTable(len(layers), decoder.num_layers, self.device)
        if options.target_skip > 0.98 * self.table.ceiling:
            raise UsageError(
                f"--target-skip {options.target_skip}: at most {self.table.ceiling:.2f} of all MLPs can be skipped, "
                f"{len(layers)} of {decoder.num_layers} layers may skip"
            )

    def _median_harm(self) -> float:
        return sorted(self.harm.values())[len(self.harm) // 2]

    def _router(self, layer: int) -> Router:
        """Random directions, and an offset that starts with the layers that do least harm."""
        size = self.decoder.hidden_size
        router = Router(size, self.options.router_width)
        nn.init.normal_(router.weight, std=0.3 / size**0.5)
        nn.init.normal_(router.inner, std=size**-0.5)
        nn.init.normal_(router.outer, std=0.02)
        nn.init.constant_(router.bias, -math.log(max(self.harm[layer], 1e-6) / self._median_harm()))
        return router

    def _probe(self, tokens: int) -> LREProbe:
        return LREProbe(self.decoder.hidden_size, 64)

    # The loop -------------------------------------------------------------------------------------------------

    def parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        routers = [p for router in self.routers.values() for p in router.parameters()]
        standins = [p for standin in self.standins.values() for p in standin.parameters()]
        return routers, standins

    def run(self) -> None:
        options = self.options
        routers, standins = self.parameters()
        for p in (*routers, *standins):
            p.requires_grad_(True)
        groups = [{"params": routers, "peak": options.router_lr}, {"params": standins, "peak": options.lr}]
        fused = self.device.type == "cuda"
        optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98), weight_decay=0.0, fused=fused)
        self._resume(optimizer)
        latch = options.gate == "cascade"
        began, saved = time.monotonic() - self.elapsed, time.monotonic()
        with (
            blended(self.decoder, self.standins, self.routers, latch=latch, sinks=options.sinks,
                    compile_layers=options.compile) as control,
            self.progress(total=options.steps or round(options.minutes or 0, 2), desc="distill",
                          unit="step" if options.steps else "min") as bar,
        ):  # fmt: skip
            while True:
                self.elapsed = time.monotonic() - began
                done = self._done()
                if done >= 1:
                    break
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * schedule(done) * min(1.0, (self.step + 1) / WARMUP_STEPS)
                loss, skipped = self._step(control, done)
                if not math.isfinite(loss):
                    raise InputError(f"the loss became {loss} at step {self.step}", hint="a smaller --lr")
                self._reduce((*routers, *standins))
                nn.utils.clip_grad_norm_((*routers, *standins), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                self.step += 1
                if self.step % 20 == 0 or self.step == 1:
                    self.history.append({"step": self.step, "kl": loss, "skipped": skipped, "seconds": self.elapsed})
                bar.update(1 if options.steps else (time.monotonic() - began - self.elapsed) / 60)
                bar.set_postfix_str(f"KL {loss:.4f} nats, skipping {skipped:.1%}", refresh=False)
                if time.monotonic() - saved > options.save_every:
                    self._save(optimizer)
                    saved = time.monotonic()
        for p in (*routers, *standins):
            p.requires_grad_(False)
        self._save(optimizer)

    def _done(self) -> float:
        if self.options.steps:
            return self.step / self.options.steps
        done = self.elapsed / (60 * (self.options.minutes or 1))
        return (
            float(self.accelerator.reduce(torch.tensor(done, device=self.device), "max")) if self.accelerator else done
        )

    def _step(self, control: Control, done: float) -> tuple[float, float]:
        ids = self._draw()
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")
        with torch.no_grad(), autocast:
            control.on = False
            dense = self.decoder.last_hidden(ids)
            control.on = True
            if not self.table.seen:
                control.start(torch.full((ids.shape[0], 1), -NEVER, device=self.device))
                self.decoder.last_hidden(ids)
                self.table.update(control.scores())
        shares = self._shares(ids.shape[0], done)
        control.noise = torch.tensor(self.options.noise * max(0.1, 1 - done / 0.8), device=self.device)
        control.start(self.table.limits(shares).requires_grad_())
        with autocast:
            gated = self.decoder.last_hidden(ids)
            loss = kl_loss(dense.flatten(0, 1), gated.flatten(0, 1), self.decoder)
        loss.backward()
        control.hold_budget()
        scores = control.scores()
        skipped = (scores > control.limit).float().mean() * self.table.ceiling
        self.table.update(scores)
        self.table.correct(shares.mean(), skipped)
        return float(loss.detach()), float(skipped)

    def _shares(self, count: int, done: float) -> Tensor:
        """Half of the sequences train the target share, the others a spread of shares; all are eased in."""
        target = self.options.target_skip
        ease = min(1.0, done / 0.15)
        wide = torch.rand(count, device=self.device) * min(0.95 * self.table.ceiling, 2.4 * target)
        chosen = torch.where(torch.rand(count, device=self.device) < self.options.spread, wide, target)
        return chosen * ease

    def _reduce(self, parameters: tuple[nn.Parameter, ...]) -> None:
        if self.accelerator and self.accelerator.num_processes > 1:
            flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
            flat = self.accelerator.reduce(flat, "mean")
            place = 0
            for p in parameters:
                if p.grad is not None:
                    p.grad.copy_(flat[place : place + p.numel()].view_as(p))
                    place += p.numel()

    def _draw(self) -> Tensor:
        rows = torch.randint(len(self.windows), (self.options.batch_size,), generator=self.generator)
        return self.windows[rows].long().to(self.device)

    def _batch_at(self, index: int) -> Tensor:
        size = self.options.batch_size
        return self.windows[index * size : (index + 1) * size].long().to(self.device)

    # Interruption ---------------------------------------------------------------------------------------------

    def _save(self, optimizer: torch.optim.Optimizer) -> None:
        if self.state_file is None or self.rank_index:
            return
        save_tensors(
            self.state_file,
            {
                "options": asdict(self.options) | {"minutes": None, "steps": None},
                "step": self.step,
                "elapsed": self.elapsed,
                "routers": {layer: r.state_dict() for layer, r in self.routers.items()},
                "standins": {layer: s.state_dict() for layer, s in self.standins.items()},
                "optimizer": optimizer.state_dict(),
                "table": self.table.table,
                "seen": self.table.seen,
                "usable": self.table.usable,
                "gain": self.table.gain,
                "history": self.history,
                "generator": self.generator.get_state(),
            },
        )

    def _resume(self, optimizer: torch.optim.Optimizer) -> None:
        if self.state_file is None or not self.state_file.exists():
            return
        state = load_tensors(self.state_file)
        now = asdict(self.options) | {"minutes": None, "steps": None}
        changed = [key for key in now if now[key] != state["options"].get(key)]
        if changed:
            raise InputError(
                "cannot resume distillation with other settings: "
                + "; ".join(f"{key} was {state['options'].get(key)}, now {now[key]}" for key in changed)
            )
        self.step, self.elapsed, self.history = state["step"], state["elapsed"], state["history"]
        for name, modules in (("routers", self.routers), ("standins", self.standins)):
            for layer, module in modules.items():
                module.load_state_dict(state[name][layer])
        optimizer.load_state_dict(state["optimizer"])
        self.table.table, self.table.seen = state["table"].to(self.device), state["seen"]
        self.table.usable, self.table.gain = state["usable"].to(self.device), state["gain"].to(self.device)
        self.generator.set_state(state["generator"])
        log.info("resumed at step %d, %.1f minutes in", self.step, self.elapsed / 60)


def schedule(done: float) -> float:
    """A cosine from 1 to 2 %; the warm-up counts steps, because the first step of a compiled run takes a minute."""
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


def exported(module: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {key: value.detach().to("cpu", dtype).clone() for key, value in module.state_dict().items()}
