"""KL(dense || gated) over the vocabulary, a chunk of rows at a time, so that logits of a 150k vocabulary fit in training.

loss = kl_loss(dense_hidden, gated_hidden, decoder)      # both [N, H]
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sedac_cli.structure import Decoder

CHUNK_LOGITS = 2**28


def kl_loss(dense: Tensor, gated: Tensor, decoder: Decoder) -> Tensor:
    """Mean over rows, in nats. Chunks are recomputed in the backward pass when there are several."""
    rows = max(1, CHUNK_LOGITS // decoder.vocab_size)
    if dense.shape[0] <= rows:
        return _kl_sum(dense, gated, decoder) / dense.shape[0]
    total = torch.zeros((), device=dense.device)
    for d, g in zip(dense.split(rows), gated.split(rows), strict=True):
        total = total + checkpoint(_kl_sum, d, g, decoder, use_reentrant=False)
    return total / dense.shape[0]


def _kl_sum(dense: Tensor, gated: Tensor, decoder: Decoder) -> Tensor:
    with torch.no_grad():
        target = torch.log_softmax(decoder.head(dense).float(), dim=-1)
    found = torch.log_softmax(decoder.head(gated).float(), dim=-1)
    return torch.nn.functional.kl_div(found, target, reduction="sum", log_target=True)
