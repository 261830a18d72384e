"""Thresholds that find themselves while the model runs: each checkpoint keeps a target exit rate, on the device.

Always true: a pass is judged by the thresholds that stood before it, then taught to them, so a token's fate never depends
on its batch neighbours; no value is read back to the host; every tensor is updated in place, so a CUDA graph that
captured a pass goes on learning at every replay.

Why not quantiles of each pass, as V6 took them: a decode step has one token, whose "quantile" is its own risk. Instead
each checkpoint keeps its last `window` risks, whatever passes they came in, and per pass of n tokens

    t     <- t + (1 - (1-alpha)^n) (quantile(last risks, aim) - t)          EMA-smoothed, per token and not per pass
    aim   <- aim + (1 - (1-CORRECTION)^n) (rate - share of the n under t)   what drift would otherwise leave wrong

The second line is adaptive conformal inference: whatever the drift, the rate over a long run meets the target.

    CascadeGate(28, probes, AdaptiveThresholds({7: 0.2, 14: 0.6}))
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sedac_cli.gates.options import REQUIRED, Option, check_options

CORRECTION = 0.01


class AdaptiveThresholds:
    """`rates`: share of the tokens that reach a checkpoint which should exit there, by layer.

    `limits` [checkpoints] are the thresholds in force; 0 (nothing exits) until `calibration_steps` tokens have been seen.
    """

    options = (
        Option("rates", list, REQUIRED, "share of the tokens reaching a checkpoint that exit there, one each", 0, 1),
        Option("calibration_steps", int, 50, "tokens a checkpoint sees before anything exits there", 1),
        Option("alpha", float, 0.05, "weight of one token in the smoothed threshold", 0, 1, open_low=True),
        Option("window", int, 256, "risks each checkpoint remembers", 8),
    )

    def __init__(self, rates: Mapping[int, float], calibration_steps: int = 50, alpha: float = 0.05, window: int = 256):
        given = {"calibration_steps": calibration_steps, "alpha": alpha, "window": window}
        checked = check_options({"rates": list(rates.values()), **given}, self.options, "adaptive thresholds:")
        self.rates: dict[int, float] = dict(sorted(zip(rates, checked["rates"], strict=True)))
        self.calibration_steps: int = checked["calibration_steps"]
        self.alpha: float = checked["alpha"]
        self.window: int = checked["window"]
        self.learning = True
        count = len(self.rates)
        self._rate = torch.tensor(list(self.rates.values()))
        self.limits = torch.empty(count)
        self._smooth = torch.empty(count)
        self._aim = torch.empty(count)
        self._seen = torch.empty(count, dtype=torch.long)
        self._judged = torch.empty(count, dtype=torch.long)
        self._exited = torch.empty(count, dtype=torch.long)
        self._risks = torch.empty(count, self.window + 1)  # the last column takes what nobody reads
        self.reset()

    def reset(self) -> None:
        """Forget everything learnt: the next pass starts the warm-up."""
        self.limits.zero_()
        self._smooth.zero_()
        self._aim.copy_(self._rate)
        self._seen.zero_()
        self._judged.zero_()
        self._exited.zero_()
        self._risks.fill_(math.inf)

    @torch.no_grad()
    def observe(self, index: int, risk: Tensor, reached: Tensor) -> None:
        """Learn from one pass at one checkpoint: `risk` [tokens], counted where `reached`."""
        if not self.learning or risk.shape[0] == 0:
            return
        risk = risk.float()
        reached = reached & ~torch.isnan(risk)
        n = reached.sum()
        self._correct_aim(index, risk, reached, n)
        self._remember(index, risk, reached, n)
        seen = self._seen[index]
        first = seen == 0
        seen += n
        filled = seen.clamp_max(self.window)
        place = torch.minimum((self._aim[index] * filled).long(), filled - 1).clamp_min(0)
        quantile = self._risks[index, : self.window].sort().values.gather(0, place.view(1)).squeeze(0)
        gain = torch.where(first, 1.0, 1.0 - (1.0 - self.alpha) ** n)
        smooth = self._smooth[index]
        smooth.copy_(torch.where(n > 0, smooth + gain * (quantile - smooth), smooth))
        rate = self._rate[index]
        limit = torch.where(rate >= 1, math.inf, torch.where(rate <= 0, 0.0, smooth))
        self.limits[index].copy_(torch.where(seen >= self.calibration_steps, limit, 0.0))

    def _correct_aim(self, index: int, risk: Tensor, reached: Tensor, n: Tensor) -> None:
        """Aim higher after too few exits and lower after too many, at most three quarters of the way to the ends."""
        exits = ((risk < self.limits[index]) & reached).sum()
        share = exits / n.clamp_min(1)
        gain = 1.0 - (1.0 - CORRECTION) ** n
        live = (self._seen[index] >= self.calibration_steps) & (n > 0)
        self._judged[index].add_(n * live)
        self._exited[index].add_(exits * live)
        aim, rate = self._aim[index], self._rate[index]
        moved = (aim + gain * (rate - share)).clamp(rate / 4, (3 + rate) / 4)
        aim.copy_(torch.where(live, moved, aim))

    def _remember(self, index: int, risk: Tensor, reached: Tensor, n: Tensor) -> None:
        """Write the last `window` reached risks into the ring, where the oldest ones are."""
        order = reached.long().cumsum(0) - 1
        keep = reached & (order >= n - self.window)
        slot = torch.where(keep, (self._seen[index] + order) % self.window, self.window)
        self._risks[index].scatter_(0, slot, risk)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Decide without learning: for a pass that repeats tokens already counted."""
        before, self.learning = self.learning, False
        try:
            yield
        finally:
            self.learning = before

    def parameters(self) -> dict[str, Any]:
        return {
            "rates": list(self.rates.values()),
            "calibration_steps": self.calibration_steps,
            "alpha": self.alpha,
            "window": self.window,
        }

    def report(self) -> list[dict[str, Any]]:
        """What each checkpoint has come to. Reads the device: not for use within a pass.

        `rate` is over the tokens judged since the warm-up; None when there was none.
        """
        columns = (self.limits, self._seen, self._judged, self._exited)
        rows = zip(self.rates.items(), *(column.tolist() for column in columns), strict=True)
        return [
            {"layer": layer, "target": rate, "threshold": limit, "tokens": seen, "judged": judged,
             "rate": exited / judged if judged else None}
            for (layer, rate), limit, seen, judged, exited in rows
        ]  # fmt: skip

    @torch.inference_mode(False)
    def to(self, device: torch.device | str) -> AdaptiveThresholds:
        """Never inference tensors: those could not be taught by a later pass outside inference mode."""
        for name in ("limits", "_rate", "_smooth", "_aim", "_seen", "_judged", "_exited", "_risks"):
            setattr(self, name, getattr(self, name).to(device))
        return self
