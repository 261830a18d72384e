"""The kernel where the tensors are on a GPU that runs it, plain torch everywhere else.

bits = entropy_bits(hidden, decoder.head, decoder.vocab_size)        # [N, H] -> [N]
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from sedac_cli.gpu import entropy, reference
from sedac_cli.gpu.compile import KINDS, no_kernels

log = logging.getLogger("sedac")


@functools.cache
def runs(device: torch.device) -> bool:
    """Whether the entropy kernel does; where it does not, that is said once."""
    missing = no_kernels(device, early=True)
    if missing:
        log.warning("plain torch reads logits for their entropy on %s, several times over: %s", device, missing)
    return not missing


def entropy_bits(hidden: Tensor, head: Callable[[Tensor], Tensor], vocab: int) -> Tensor:
    """Entropy in bits of the distribution that `head` gives for each row, a chunk of rows at a time."""
    if hidden.is_cuda and hidden.dtype in KINDS and runs(hidden.device):
        return entropy.linear_entropy(hidden, head, vocab).entropy
    return reference.linear_bits(hidden, head, vocab)
