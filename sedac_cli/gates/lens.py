"""Lenses: how uncertain would the model be if it had to answer from this layer's state? Entropy in bits, per token.

`HeadLens` asks the model's own final norm and output head: exact, and as dear as the head (2*H*V FLOPs per token and
check). `ProbeLens` asks small trained probes: 2*(H+1)*r. Both are costed as what they are.

    entropy = HeadLens(decoder)(7, hidden)        # [n, H] -> [n]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sedac_cli.errors import InputError
from sedac_cli.gpu.choose import entropy_bits
from sedac_cli.probes import LREProbe
from sedac_cli.structure import Decoder, describe


class Lens(Protocol):
    def __call__(self, layer: int, hidden: Tensor) -> Tensor: ...

    def cost_per_token(self, layer: int, hidden_size: int) -> float: ...

    def to(self, device: torch.device | str) -> Any: ...

    def layers(self) -> list[int] | None:
        """The layers it can look at; None: all of them."""
        ...


class HeadLens:
    """The logit lens: final norm, output head, Shannon entropy; logits are made chunk by chunk."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self.norm = find_final_norm(decoder)

    def __call__(self, layer: int, hidden: Tensor) -> Tensor:
        entropy = entropy_bits(hidden, lambda rows: self.decoder.head(self.norm(rows)), self.decoder.vocab_size)
        return entropy.to(hidden.device)

    def cost_per_token(self, layer: int, hidden_size: int) -> float:
        return 2.0 * hidden_size * self.decoder.vocab_size

    def to(self, device: torch.device | str) -> HeadLens:
        return self

    def layers(self) -> None:
        return None


class ProbeLens:
    """One LREProbe per checked layer, trained to predict the entropy."""

    def __init__(self, probes: Mapping[int, LREProbe]):
        self.probes = dict(probes)

    def __call__(self, layer: int, hidden: Tensor) -> Tensor:
        return self.probes[layer](hidden)

    def cost_per_token(self, layer: int, hidden_size: int) -> float:
        return 2.0 * (hidden_size + 1) * self.probes[layer].rank

    def to(self, device: torch.device | str) -> ProbeLens:
        self.probes = {layer: probe.to(device) for layer, probe in self.probes.items()}
        return self

    def layers(self) -> list[int]:
        return sorted(self.probes)


@torch.inference_mode()
def find_final_norm(decoder: Decoder) -> nn.Module:
    """What the backbone does between its last layer and the head: a child without matrices, proven by running it.

    Norms that sit elsewhere (after the embeddings, say) look the same by structure; only the right one turns the output
    of the last layer into what the head reads.
    """
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = decoder.layers[-1].register_forward_hook(keep)
    try:
        ids = torch.arange(4, device=decoder.device).unsqueeze(0) % decoder.vocab_size
        expected = decoder.last_hidden(ids)
    finally:
        handle.remove()
    candidates = [
        child
        for child in decoder.backbone.children()
        if not isinstance(child, nn.ModuleList) and not any(p.dim() > 1 for p in child.parameters())
    ]
    for candidate in reversed([nn.Identity(), *candidates]):
        try:
            got = candidate(seen[-1])
        except (TypeError, RuntimeError):  # a rotary embedding, say: not a map of states
            continue
        if isinstance(got, Tensor) and got.shape == expected.shape and torch.equal(got.to(expected.device), expected):
            return candidate
    raise InputError(
        f"cannot tell which part of {type(decoder.model).__name__} is its final norm: the logit lens needs it\n"
        + describe(decoder.backbone, depth=0),
        hint="gate 'entropy' with lens=FOLDER reads trained probes instead",
    )
