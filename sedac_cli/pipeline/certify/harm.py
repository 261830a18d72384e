"""What a user promises (`ppl=1.02`, `agreement=0.98`, `kl=0.05`) as a loss per sequence in [0, 1] with a bounded mean.

Every promise is about an expectation over sequences of the kind of text calibrated on: a sequence's own mean over its
predicted tokens, clipped to a stated range, averaged over sequences. Clipping at the upper end hides harm, so it is
counted wherever it happens; at the lower end it hides luck, which is on the safe side.

    harm = Harm.parse("agreement=0.98")
    harm.losses(evaluation.per_sequence()), harm.bound
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sedac_cli.errors import InputError, UsageError

Array = np.ndarray[Any, Any]
CLIP_NATS = 0.5
CLIP_TIMES = 4.0
RANGES = {"ppl": "above 1", "agreement": "above 0 and below 1", "kl": "above 0"}


@dataclass(frozen=True)
class Harm:
    """`limit` as the user gave it. `raw` values are in the measure's own unit: nats, or a share of positions."""

    measure: str
    limit: float

    def __post_init__(self) -> None:
        if self.measure not in RANGES:
            raise UsageError(f"'{self.measure}' is not a harm that can be limited", hint="ppl, agreement or kl")
        ok = {"ppl": self.limit > 1, "agreement": 0 < self.limit < 1, "kl": self.limit > 0}[self.measure]
        if not (ok and math.isfinite(self.limit)):
            raise UsageError(f"{self.measure}={self.limit:g}: a limit of {self.measure} is {RANGES[self.measure]}")

    @classmethod
    def parse(cls, text: str) -> Harm:
        name, sign, value = (part.strip() for part in text.partition("="))
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not sign or math.isnan(number):
            raise UsageError(f"--max-harm: '{text}' is not a limit", hint="ppl=1.02, agreement=0.98 or kl=0.05")
        return cls(name, number)

    @classmethod
    def from_target(cls, target: Mapping[str, Any]) -> Harm:
        """From the promise of a thresholds file."""
        try:
            return cls(str(target["measure"]), float(target["limit"]))
        except (KeyError, TypeError, ValueError):
            raise InputError(f"a certified promise without measure and limit: {dict(target)}") from None

    @property
    def limit_raw(self) -> float:
        """The bound on the mean raw value."""
        if self.measure == "ppl":
            return math.log(self.limit)
        return 1 - self.limit if self.measure == "agreement" else self.limit

    @property
    def clip(self) -> tuple[float, float]:
        """The range raw values are clipped to."""
        if self.measure == "ppl":
            widest = max(CLIP_NATS, CLIP_TIMES * self.limit_raw)
            return -widest, widest
        return 0.0, (1.0 if self.measure == "agreement" else CLIP_TIMES * self.limit)

    @property
    def bound(self) -> float:
        """The bound on the mean loss."""
        return self._scaled(self.limit_raw)

    @property
    def harmless(self) -> float:
        """The loss of a gate that changes nothing."""
        return self._scaled(0.0)

    def _scaled(self, raw: Any) -> Any:
        low, high = self.clip
        return (raw - low) / (high - low)

    def raw(self, sums: Mapping[str, Array]) -> Array:
        """One value per sequence, not clipped, from the sums over its predicted tokens. Broken output counts as infinite."""
        tokens = sums["tokens"]
        if self.measure == "ppl":
            value = (sums["nll_gated"] - sums["nll_dense"]) / tokens
        elif self.measure == "agreement":
            value = 1 - sums["agree"] / tokens
        else:
            value = sums["kl"] / tokens
        return np.where(np.isnan(value), np.inf, value)

    def losses(self, sums: Mapping[str, Array]) -> Array:
        """In [0, 1], one per sequence."""
        return np.clip(self._scaled(np.clip(self.raw(sums), *self.clip)), 0.0, 1.0)

    def clipped_above(self, sums: Mapping[str, Array]) -> int:
        """Sequences whose harm is larger than what was counted."""
        return int((self.raw(sums) > self.clip[1]).sum())

    def shown(self, mean_loss: float) -> float:
        """A mean loss in the unit the limit was given in: a ppl ratio, an agreement, nats."""
        low, high = self.clip
        raw = low + mean_loss * (high - low)
        return math.exp(raw) if self.measure == "ppl" else 1 - raw if self.measure == "agreement" else raw

    def kept(self, value: float) -> bool:
        """Whether a value, as shown, is within the limit."""
        return value >= self.limit if self.measure == "agreement" else value <= self.limit

    @property
    def sentence(self) -> str:
        """Exactly what is promised."""
        low, high = self.clip
        what = {
            "ppl": f"E[clip(mean over a sequence's predicted tokens of nll_gated - nll_dense, {low:g}, {high:g})] "
            f"<= log({self.limit:g}) = {self.limit_raw:.6g} nats",
            "agreement": f"E[share of a sequence's predicted positions whose argmax differs from dense] <= {self.limit_raw:.6g}",
            "kl": f"E[min(mean over a sequence's predicted tokens of KL(dense || gated), {high:g})] <= {self.limit:g} nats",
        }[self.measure]
        return f"{what}; E over sequences drawn independently as the calibration sequences were"

    def __str__(self) -> str:
        sign = ">=" if self.measure == "agreement" else "<="
        name = {"ppl": "ppl ratio", "agreement": "agreement", "kl": "KL (nats)"}[self.measure]
        return f"{name} {sign} {self.limit:g}"
