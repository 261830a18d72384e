"""Where drafts come from besides the gated model, and how many to make.

NgramLookup(longest=4, shortest=2).propose([5, 6, 7, 9, 5, 6], 2)      # [7, 9]: what followed the last time
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SUFFIX_LONGEST = 64
DECAY = 0.97
"""Of what was accepted before, per verified draft: about 30 of them count."""
RETRY = 16
"""Steps without drafts after which one is tried again: the text may have become easier."""
ROW_COST = 0.05
"""Of one dense step, for one more row in a verify pass. On two busy CPU cores a pass of 9 rows took 1.4 steps with 7 M
parameters and 2.2 with 54 M; where weights are read from slow memory it is nearly nothing."""


@dataclass(frozen=True)
class NgramLookup:
    """The last `n` tokens, longest first, are looked for earlier in the text; what followed the latest match is the draft."""

    longest: int = 4
    shortest: int = 2

    def propose(self, ids: Sequence[int], count: int) -> list[int]:
        ids = list(ids)
        start = self._longest_match(ids)
        return [] if start is None or count < 1 else ids[start : start + count]

    def _longest_match(self, ids: list[int]) -> int | None:
        """Where the text goes on after the best earlier match. One walk backwards: matches are extended in place."""
        best, best_length = None, self.shortest - 1
        last = ids[-1]
        for end in range(len(ids) - 2, -1, -1):
            if ids[end] != last:
                continue
            length = 1
            while length < self.longest and end - length >= 0 and ids[end - length] == ids[-1 - length]:
                length += 1
            if length > best_length:
                best, best_length = end + 1, length
                if length == self.longest:
                    break
        return best


class DraftLength:
    """How many tokens to draft: the number that emits most per cost, given how often a draft was accepted lately.

    With a the chance that a draft is accepted after those before it were, k drafts emit (1 - a^(k+1)) / (1 - a) tokens, and
    cost 1 + k (c + ROW_COST) dense steps, c being the cost of one draft. Fixed unless `adaptive`.
    """

    def __init__(self, longest: int, adaptive: bool, cost: float):
        self.longest, self.adaptive, self.cost = longest, adaptive, cost
        self._accepted, self._tried = 3.0, 4.0  # a start that drafts
        self._idle = 0

    @property
    def acceptance(self) -> float:
        return self._accepted / self._tried

    def choose(self) -> int:
        if not self.adaptive:
            return self.longest
        best = max(range(self.longest + 1), key=self.gain)
        if best == 0:
            self._idle += 1
            if self._idle >= RETRY:
                self._idle, best = 0, 1
        else:
            self._idle = 0
        return best

    def gain(self, count: int) -> float:
        """Tokens per dense step's cost; without drafts it is 1."""
        a = min(self.acceptance, 0.999)
        return (1 - a ** (count + 1)) / (1 - a) / (1 + count * (self.cost + ROW_COST))

    def learn(self, accepted: int, proposed: int) -> None:
        """Drafts after the first that was refused were never judged."""
        judged = accepted + (accepted < proposed)
        for index in range(judged):
            self._accepted = self._accepted * DECAY + (index < accepted)
            self._tried = self._tried * DECAY + 1
