"""Deep thinking (V9's "O1"): who is computed again, whole, because the answer came out uncertain.

policy = DeepThinking(tau_high=4.5, max_rounds=2)
force = policy.rerun(entropy, real, force, round=1)      # [B, T] each; True: every MLP of this token runs
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from sedac_cli.errors import UsageError


@dataclass(frozen=True)
class DeepThinking:
    """A token whose final entropy (bits) is above `tau_high` is run again with all skips off, at most `max_rounds` times.

    Round 1 runs the uncertain tokens whole. From round 2 on, the tokens before an uncertain one run whole too: a token
    that is uncertain still can gain nothing more itself, but the keys and values it attends to can, and its answer is
    then the dense model's. A token once forced stays forced, so the rounds only ever add computation.
    """

    tau_high: float = 4.5
    max_rounds: int = 1

    def __post_init__(self) -> None:
        if math.isnan(self.tau_high) or self.tau_high < 0:
            raise UsageError(f"deep thinking: tau_high is {self.tau_high}; an entropy in bits is >= 0")
        if self.max_rounds < 0:
            raise UsageError(f"deep thinking: max_rounds is {self.max_rounds}: it cannot be negative")

    def rerun(self, entropy: Tensor, real: Tensor, force: Tensor, round: int) -> Tensor:
        """[B, T] final entropies -> [B, T] tokens to force in this round (counted from 1). No host sync."""
        wanted = (entropy > self.tau_high) & real
        if round >= 2:
            wanted = wanted.flip(1).long().cumsum(1).flip(1) > 0
        return force | (wanted & real)
