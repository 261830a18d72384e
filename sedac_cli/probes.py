"""LREProbe: a small network that reads a hidden state and says how risky it would be to skip. Risk >= 0, low = safe.

risk = load_probe(path)(hidden)      # [tokens, hidden] -> [tokens], float32
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from sedac_cli.artifacts.tensors import load_tensors
from sedac_cli.errors import InputError

KEYS = ("proj.weight", "proj.bias", "norm.weight", "norm.bias", "head.weight", "head.bias")


class LREProbe(nn.Module):
    """Linear(hidden -> rank), LayerNorm, Linear(rank -> 1), Softplus; float32 whatever the model's precision."""

    def __init__(self, hidden_size: int, rank: int = 64):
        super().__init__()
        self.proj = nn.Linear(hidden_size, rank)
        self.norm = nn.LayerNorm(rank)
        self.head = nn.Linear(rank, 1)

    @property
    def hidden_size(self) -> int:
        return self.proj.in_features

    @property
    def rank(self) -> int:
        return self.proj.out_features

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [...]."""
        return nn.functional.softplus(self.head(self.norm(self.proj(hidden.float())))).squeeze(-1)


def probe_name(layer: int) -> str:
    return f"sedac_probe_layer{layer}.pth"


def load_probe(path: Path, hidden_size: int | None = None) -> LREProbe:
    """A probe from its bare state dict; older files without `proj.bias` load too. Width and values are checked."""
    state = load_tensors(path)
    if not isinstance(state, dict) or not set(KEYS) - {"proj.bias"} <= set(state):
        found = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise InputError(f"{path} is not a probe: expected {', '.join(KEYS)}, found {found}")
    if not all(isinstance(value, Tensor) for value in state.values()) or state["proj.weight"].dim() != 2:
        raise InputError(
            f"{path} is not a probe: `proj.weight` must be a matrix [rank, hidden], and all values tensors"
        )
    rank, width = state["proj.weight"].shape
    if hidden_size is not None and width != hidden_size:
        raise InputError(f"{path} reads hidden states of width {width}; the model's are {hidden_size} wide")
    if not all(torch.isfinite(value).all() for value in state.values()):
        raise InputError(f"{path} holds NaN or infinite weights")
    state.setdefault("proj.bias", torch.zeros(rank))
    probe = LREProbe(width, rank)
    try:
        probe.load_state_dict({key: value.float() for key, value in state.items()})
    except RuntimeError as error:
        raise InputError(f"{path} does not fit a probe: {str(error).splitlines()[-1].strip()}") from None
    return probe.eval().requires_grad_(False)
