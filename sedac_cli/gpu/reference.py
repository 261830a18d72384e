"""The plain-torch twin of every kernel: what the kernels must equal, and what runs where there is no GPU.

Entropies are Shannon entropies in bits. Rows are processed in chunks, so that a vocabulary of 256k never needs more
than `CHUNK_BYTES` of float32 scratch, however many tokens there are.

    entropy, confidence, best = entropy_of_logits(logits)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

LN2 = math.log(2.0)
CHUNK_BYTES = 32 * 2**20
# On a CPU a block of 32 MiB or more is mapped and zeroed anew each time: a 128 x 16384 head on 4096 rows took 0.40 s of one
# core in chunks of 32 MiB and 0.25 s in chunks of 16.
CPU_CHUNK_BYTES = 16 * 2**20
CACHE_BYTES = 2**20


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


def linear_entropy(hidden: Tensor, head: Callable[[Tensor], Tensor], vocab: int) -> Tensor:
    """Entropy in bits of `head(hidden)` for [N, H] rows; the logits of more than one chunk never exist at once."""
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
    buffers = torch.empty(2, min(rows, max(1, CACHE_BYTES // (4 * vocab))), vocab)
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
