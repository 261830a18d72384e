"""What a probe learns to predict, per token and checkpoint: `final` or `lens` entropy in bits, or `harm` in nats.

label = label_batch("final", decoder, ids, mask, states, last_hidden)    # {layer: [B, T]}
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from sedac_cli.gates.simple import AlwaysGate
from sedac_cli.gpu.choose import entropy_bits
from sedac_cli.gpu.reference import linear_kl
from sedac_cli.runtime.skip import skipping
from sedac_cli.structure import Decoder

Target = Literal["final", "lens", "harm"]
UNITS = {"final": "bits", "lens": "bits", "harm": "nats"}


def label_batch(
    target: Target,
    decoder: Decoder,
    ids: Tensor,
    mask: Tensor | None,
    states: dict[int, Tensor],
    last_hidden: Tensor,
) -> dict[int, Tensor]:
    """Labels [B, T] for each checkpoint in `states`; `mask` as it was given to the pass that made them.

    final: entropy of the model's own next-token distribution, the same for every checkpoint.
    lens:  entropy of the distribution read from the checkpoint's state by the final norm and the output head.
    harm:  KL(dense || every MLP from the checkpoint on skipped): what skipping there really does to this token.
    """
    shape = ids.shape
    if target == "final":
        entropy = entropy_bits(last_hidden.flatten(0, 1), decoder.head, decoder.vocab_size).view(shape)
        return dict.fromkeys(states, entropy)
    if target == "lens":
        return {
            layer: entropy_bits(decoder.final_norm(hidden).flatten(0, 1), decoder.head, decoder.vocab_size).view(shape)
            for layer, hidden in states.items()
        }
    labels = {}
    for layer in states:
        with skipping(decoder.model, AlwaysGate(decoder.num_layers, layer), decoder=decoder):
            skipped = decoder.last_hidden(ids, mask)
        labels[layer] = linear_kl(
            last_hidden.flatten(0, 1), skipped.flatten(0, 1), decoder.head, decoder.vocab_size
        ).view(shape)
    return labels
