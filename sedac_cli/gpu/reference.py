"""The plain-torch twin of every kernel: what the kernels must equal, and what runs where there is no GPU.

Entropies are Shannon entropies in bits. Rows are processed in chunks, so that a vocabulary of 256k never needs more
than `CHUNK_BYTES` of float32 scratch, however many tokens there are. Nothing here waits for a device: what depends on the
data (how many rows stay) is a tensor, as in the kernels.

    entropy, confidence, best = entropy_of_logits(logits)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

LN2 = math.log(2.0)
CHUNK_BYTES = 32 * 2**20
# On a CPU a block of 32 MiB or more is mapped and zeroed anew each time: a 128 x 16384 head on 4096 rows took 0.40 s of one
# core in chunks of 32 MiB and 0.25 s in chunks of 16.
CPU_CHUNK_BYTES = 16 * 2**20
CACHE_BYTES = 2**20


class Entropy(NamedTuple):
    """Per row: entropy in bits, largest probability, index of the largest logit."""

    entropy: Tensor
    confidence: Tensor
    argmax: Tensor


class Decision(NamedTuple):
    """Per token: entropy in bits, sigmoid confidence, True where the MLP may be skipped, load."""

    entropy: Tensor
    confidence: Tensor
    decision: Tensor
    load: Tensor


class Routed(NamedTuple):
    """Rows sorted by a decision. `counts` (int32: active, exit) says how many rows of each buffer are valid.

    slot[i] >= 0 is row i's place in `active`; -1 - slot[i] its place in `exit`.
    """

    active: Tensor
    active_indices: Tensor
    exit: Tensor
    exit_indices: Tensor
    counts: Tensor
    slot: Tensor


class Packed(NamedTuple):
    """The rows that stay, packed; `counts` and `slot` as in Routed."""

    rows: Tensor
    indices: Tensor
    counts: Tensor
    slot: Tensor


def entropy_of_logits(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[N, V] logits -> entropy in bits [N], largest probability [N], argmax [N]; float32 arithmetic.

    H = log Z - sum(e^d d) / Z with d = logit - max: one exponential per logit. A logit of -inf has probability 0.
    """
    logits = logits.float()
    top, best = logits.max(dim=-1)
    shifted = logits - top.unsqueeze(-1)
    weight = shifted.exp()
    total = weight.sum(dim=-1)
    moment = (weight * shifted.clamp_min(-1e4)).sum(dim=-1)
    entropy = (total.log() - moment / total) / LN2
    return entropy.clamp_min(0.0), 1.0 / total, best


def kl_of_logits(dense: Tensor, other: Tensor) -> Tensor:
    """KL(dense || other) per row, in nats."""
    p = torch.log_softmax(dense.float(), dim=-1)
    q = torch.log_softmax(other.float(), dim=-1)
    return (p.exp() * (p - q)).sum(dim=-1).clamp_min(0.0)


def row_chunks(rows: int, vocab: int, limit: int = CHUNK_BYTES) -> Iterator[slice]:
    """Slices of rows whose float32 logits fit into `limit` bytes."""
    step = max(1, limit // (4 * max(vocab, 1)))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def linear_entropy(hidden: Tensor, head: Callable[[Tensor], Tensor], vocab: int) -> Entropy:
    """`fused_entropy` of `head(hidden)` for [N, H] rows; the logits of more than one chunk never exist at once."""
    return by_chunk(hidden, head, row_chunks(hidden.shape[0], vocab), entropy_of_logits)


def by_chunk(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    chunks: Iterable[slice],
    measure: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
) -> Entropy:
    """What `measure` finds in the logits of each chunk of [N, H] rows, put together."""
    result = Entropy(
        torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device),
        torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device),
        torch.empty(hidden.shape[0], dtype=torch.int64, device=hidden.device),
    )
    for rows in chunks:
        for whole, part in zip(result, measure(head(hidden[rows])), strict=True):
            whole[rows] = part
    return result


def linear_bits(hidden: Tensor, head: Callable[[Tensor], Tensor], vocab: int) -> Tensor:
    """The entropy alone of `linear_entropy`: on a CPU the other two are worth leaving out."""
    out = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    for rows in row_chunks(hidden.shape[0], vocab, CHUNK_BYTES if hidden.is_cuda else CPU_CHUNK_BYTES):
        logits = head(hidden[rows])
        out[rows] = entropy_of_logits(logits)[0] if logits.is_cuda else _entropy_in_cache(logits)
    return out


@torch.no_grad()
def _entropy_in_cache(logits: Tensor) -> Tensor:
    """The first of what `entropy_of_logits` returns: the same operations on few rows at a time, in two buffers that stay.
    1024 x 16384 logits: 31 ms of one core; 115 ms where every step takes new memory, 230 ms in one piece."""
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.float32)
    buffers = torch.empty(2, min(rows, max(1, CACHE_BYTES // (4 * vocab))), vocab, dtype=torch.float32)
    for few in row_chunks(rows, vocab, CACHE_BYTES):
        shifted, weight = buffers[:, : few.stop - few.start]
        shifted.copy_(logits[few])
        shifted -= shifted.amax(dim=-1, keepdim=True)
        torch.exp(shifted, out=weight)
        total = weight.sum(dim=-1)
        moment = weight.mul_(shifted.clamp_min_(-1e4)).sum(dim=-1)
        out[few] = (total.log() - moment / total) / LN2
    return out.clamp_min_(0.0)


def linear_kl(dense: Tensor, other: Tensor, head: Callable[[Tensor], Tensor], vocab: int) -> Tensor:
    """KL(dense || other) in nats between the distributions that `head` gives for two sets of [N, H] rows."""
    out = torch.empty(dense.shape[0], dtype=torch.float32, device=dense.device)
    for rows in row_chunks(dense.shape[0], vocab):
        out[rows] = kl_of_logits(head(dense[rows]), head(other[rows]))
    return out


def fused_entropy(logits: Tensor) -> Entropy:
    """Entropy, largest probability and argmax of [..., V] logits.

    A row with NaN or +inf, or with nothing but -inf, has entropy NaN; with NaN its argmax is some index of the row.
    """
    rows = logits.reshape(-1, logits.shape[-1])
    result = linear_entropy(rows, lambda part: part, rows.shape[-1])
    return Entropy(*(tensor.view(logits.shape[:-1]) for tensor in result))


def fused_entropy_decision(
    logits: Tensor,
    hidden: Tensor,
    prev_hidden: Tensor,
    mean: float | Tensor,
    std: float | Tensor,
    layer_progress: float,
    threshold: float | Tensor,
) -> Decision:
    """The V9 rule: skip iff confidence * stability * p > threshold - 0.2 p. A NaN never skips."""
    entropy = fused_entropy(logits).entropy
    spread = std.clamp_min(1e-6) if isinstance(std, Tensor) else max(std, 1e-6)
    confidence, load, decision = entropy_decision(
        entropy, hidden, prev_hidden, mean, spread, layer_progress, threshold
    )  # fmt: skip
    return Decision(entropy, confidence, decision, load)


def entropy_decision(
    entropy: Tensor, hidden: Tensor, previous: Tensor, mean: Tensor | float, sd: Tensor | float,
    progress: float, threshold: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The V9 rule from entropies [n] and states [n, H] x 2: confidence [n], load [n], skip [n]; sd > 0."""
    confidence = torch.sigmoid(2.0 * (mean - entropy) / sd)
    h = hidden.float()
    change = (h - previous.float()).norm(dim=-1) / h.norm(dim=-1).clamp_min(1e-12)
    calm = 1.0 / (1.0 + change)
    load = 0.5 * (1.0 - confidence) + 0.3 * (1.0 - calm) + 0.2 * (1.0 - progress)
    return confidence, load, confidence * calm * progress > threshold - 0.2 * progress


def probe_risk(
    hidden: Tensor,
    probe: Any,
    *,
    threshold: float | Tensor | None = None,
    latched: Tensor | None = None,
    may_skip: Tensor | None = None,
    real: Tensor | None = None,
    needs: Tensor | None = None,
) -> Tensor:
    """The risk of [..., H] hidden states by an LREProbe; with a threshold, `latched` and `needs` are updated in place.

    A token fires iff risk < threshold (never on NaN) and it may skip; needs = 1 iff a real token is left.
    """
    norm = nn.functional.layer_norm(
        nn.functional.linear(hidden.float(), probe.proj.weight.float(), probe.proj.bias),
        (probe.proj.weight.shape[0],), probe.norm.weight, probe.norm.bias, probe.norm.eps,
    )  # fmt: skip
    risk = nn.functional.softplus(nn.functional.linear(norm, probe.head.weight, probe.head.bias)).squeeze(-1)
    gone = risk < (float("-inf") if threshold is None else threshold)
    if may_skip is not None:
        gone = gone & may_skip.view(gone.shape).bool()
    if latched is not None:
        gone = gone | latched.view(gone.shape).bool()
        latched.copy_(gone.view(latched.shape))
    _publish(~gone, real, needs)
    return risk


def router_score(
    hidden: Tensor,
    router: Any,
    *,
    threshold: float | Tensor = 0.0,
    may_skip: Tensor | None = None,
    real: Tensor | None = None,
    needs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Score of [..., H] by a learned gate's Router; run = not score > threshold. NaN runs."""
    score = router(hidden)
    run = ~(score > threshold)
    if may_skip is not None:
        run = run | ~may_skip.view(run.shape).bool()
    _publish(run, real, needs)
    return score, run


def _publish(wanted: Tensor, real: Tensor | None, needs: Tensor | None) -> None:
    if needs is not None:
        left = wanted if real is None else wanted & real.view(wanted.shape).bool()
        needs.copy_(left.any().view(needs.shape))


def route_split(hidden: Tensor, decision: Tensor) -> Routed:
    """[N, H] rows -> those with decision False (active) and True (exit), in order. Past `counts` the buffers mean nothing."""
    leaves = decision.bool()
    active, exit = torch.argsort(leaves.int(), stable=True), torch.argsort((~leaves).int(), stable=True)
    place = torch.where(leaves, -leaves.cumsum(0), (~leaves).cumsum(0) - 1).int()
    counts = torch.stack([(~leaves).sum(), leaves.sum()]).int()
    return Routed(hidden[active], active, hidden[exit], exit, counts, place)


def route_merge(active: Tensor, exit: Tensor, slot: Tensor) -> Tensor:
    """The rows of both buffers in their first order."""
    stays = (slot >= 0).unsqueeze(-1)
    return torch.where(stays, active[slot.clamp_min(0).long()], exit[(-1 - slot).clamp_min(0).long()])


def gather_rows(hidden: Tensor, scale: Tensor) -> Packed:
    """[N, H] -> the rows with scale > 0, packed in order."""
    routed = route_split(hidden, ~(scale > 0))
    return Packed(routed.active, routed.active_indices, routed.counts, routed.slot)


def scatter_rows(rows: Tensor, slot: Tensor) -> Tensor:
    """Packed rows back in their places; the others become 0."""
    return torch.where((slot >= 0).unsqueeze(-1), rows[slot.clamp_min(0).long()], rows.new_zeros(()))
