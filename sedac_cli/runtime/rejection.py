"""Which drafts stand: exact matching for greedy decoding, the rejection rule for sampling. What comes out is distributed
as if the full model alone had made it, whatever the drafts were.

A draft x from q stands with probability min(1, p(x) / q(x)); where it falls, the token is drawn from max(p - q, 0),
normalised; where all stand, one more is drawn from p. A draft copied from the text has q(x) = 1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accept_greedy(best: list[int], drafts: list[int]) -> tuple[int, int]:
    """(drafts that stand, the token after them). `best[i]`: the full model's choice after i drafts."""
    count = 0
    while count < len(drafts) and drafts[count] == best[count]:
        count += 1
    return count, best[count]


def accept_sampled(
    p: Tensor, q: list[Tensor | None], drafts: list[int], generator: torch.Generator | None = None
) -> tuple[int, int]:
    """`p` [len(drafts) + 1, V]: the full model's distributions. `q[i]`: what draft i was drawn from; None: it was copied."""
    for index, (token, proposal) in enumerate(zip(drafts, q, strict=True)):
        chance = p[index, token] if proposal is None else p[index, token] / proposal[token]
        if float(torch.rand((), device=p.device, generator=generator)) < float(chance):
            continue
        return index, draw(residual(p[index], proposal, token), generator)
    return len(drafts), draw(p[len(drafts)], generator)


def residual(p: Tensor, q: Tensor | None, token: int) -> Tensor:
    """max(p - q, 0), not normalised; p itself where rounding has left nothing."""
    if q is None:
        left = p.clone()
        left[token] = 0
    else:
        left = (p - q).clamp_min(0)
    return left if float(left.sum()) > 0 else p


def draw(weights: Tensor, generator: torch.Generator | None = None) -> int:
    return int(torch.multinomial(weights, 1, generator=generator))
