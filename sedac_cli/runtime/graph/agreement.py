"""How far a step's logits are from the model's own, and how far they may be.

Rounding alone moves logits, in one model more than in another: large keys in bfloat16 do. So a model is asked for its own logits
twice, in one pass and by a step over its own cache, and what lies between these two is allowed, twice over, beside a limit
for all; up to a point, for a model whose own step is wrong is no measure.

    gap = Gap.of(found, own, own_step(loaded.model, before, last), torch.bfloat16)
    gap.fits, gap.apart
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sedac_cli.errors import ran_out
from sedac_cli.runtime.past import handing

AGREE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""As a share of their norm, whatever the model."""
SHORT, LONG = 6, 64
"""Tokens over which that is measured: the first of a sequence, and the last for which cache and model have positions."""
TIMES, MOST = 2.0, 4.0
"""Of the model's own difference, and of the limit for all."""


@dataclass(frozen=True)
class Gap:
    """Shares of the logits' norm."""

    apart: float
    allowed: float

    @classmethod
    def of(cls, found: Tensor, own: Tensor, again: Tensor | None, dtype: torch.dtype) -> Gap:
        def share(other: Tensor) -> float:
            return float((other.float() - own.float()).norm() / own.float().norm())

        limit = AGREE[dtype]
        spread = 0.0 if again is None else TIMES * share(again)
        return cls(share(found), min(MOST * limit, spread) if spread > limit else limit)

    @property
    def fits(self) -> bool:
        """NaN does not."""
        return self.apart <= self.allowed

    @classmethod
    def worst(cls, *gaps: Gap) -> Gap:
        return next((gap for gap in gaps if not gap.fits), gaps[-1])


@torch.inference_mode()
def own_step(model: Any, before: dict[str, Any], last: dict[str, Any]) -> Tensor | None:
    """Logits of the model's own step over its own cache; None where it makes none."""
    from transformers import DynamicCache

    given = {**handing(model, DynamicCache(config=model.config)), "use_cache": True}
    try:
        model(**before, **given)
        return model(**last, **given).logits[0, -1]
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        if ran_out(error):
            raise
        return None
