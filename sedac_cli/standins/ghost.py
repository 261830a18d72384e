"""Ghost KV: for a token that skips whole layers, the K and V it would have had there, told from where it left.

Always true: K is predicted as it is *before* the rotary embedding, so positions are applied exactly, by the model's own
angles; V as the attention reads it. The start is the closed-form linear map, and training adds what is not linear.

    ghost = GhostKV.load(Path("ghost_kv.pth")); ghost.layers          # (18, 19, 20, 21)
    k, v = ghost(19, hidden)                    # [n, hidden] entering layer 18 -> two [n, heads, head_dim]
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sedac_cli.artifacts.manifest import ModelIdentity
from sedac_cli.artifacts.tensors import load_tensors, save_tensors
from sedac_cli.errors import InputError

SCHEMA = 1
KIND = "ghost-kv"


@dataclass(frozen=True)
class GhostBatch:
    """What the dense model made of some tokens: the state entering the first skipped layer [n, hidden], the K (before
    rotary) and V [n, heads, head_dim] of each skipped layer, and the state leaving the last."""

    entering: Tensor
    k: dict[int, Tensor]
    v: dict[int, Tensor]
    leaving: Tensor


@dataclass(frozen=True)
class GhostLosses:
    """Means over layers and batches. `cosine` is 1 - cosine; `mse` is in units of the target's variance."""

    cosine: float
    mse: float
    leaving: float
    tokens: int


class GhostMap(nn.Module):
    """y = W n + B silu(A n) + b with n = h / rms(h), without weights: in the first skipped layer K and V are exactly
    linear in n where the model norms by rms. B starts at zero, so training starts at the linear map."""

    def __init__(self, inputs: int, outputs: int, rank: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.a = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
        self.b = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, n: Tensor) -> Tensor:
        y = nn.functional.linear(n, self.weight.to(n.dtype), self.bias.to(n.dtype))
        if self.a.shape[0]:
            z = nn.functional.silu(nn.functional.linear(n, self.a.to(n.dtype)))
            y = y + nn.functional.linear(z, self.b.to(n.dtype))
        return y

    def flops(self) -> float:
        return 2.0 * (self.weight.numel() + self.a.numel() + self.b.numel())


def normed(hidden: Tensor) -> Tensor:
    """h / rms(h), in the dtype of h."""
    h = hidden.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(hidden.dtype)


class GhostKV(nn.Module):
    """The maps of a span of layers. `leaving` moves the token's state over the whole span: without it the token enters
    the layer after the span as it entered the first of it. `rank` 0 leaves the nonlinear part out."""

    def __init__(self, layers: Iterable[int], hidden_size: int, heads: int, head_dim: int, rank: int = 32):
        super().__init__()
        self.layers = tuple(layers)
        self.heads, self.head_dim, self.hidden_size, self.rank = heads, head_dim, hidden_size, rank
        self.maps = nn.ModuleDict({str(x): GhostMap(hidden_size, 2 * heads * head_dim, rank) for x in self.layers})
        self.leaving = GhostMap(hidden_size, hidden_size, rank)
        self.identity: ModelIdentity | None = None
        self.recipe: dict[str, Any] = {}

    @property
    def first(self) -> int:
        return self.layers[0]

    @property
    def last(self) -> int:
        return self.layers[-1]

    def forward(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """States entering the first skipped layer [n, hidden] -> K before rotary, V of `layer`: [n, heads, head_dim]."""
        both = self.maps[str(layer)](normed(hidden)).view(-1, 2, self.heads, self.head_dim)
        return both[:, 0], both[:, 1]

    def leave(self, hidden: Tensor) -> Tensor:
        """[n, hidden] entering the first skipped layer -> leaving the last."""
        return hidden + self.leaving(normed(hidden))

    # A stand-in to the runtimes -----------------------------------------------------------------------------------

    def rows(self, layer: int, x: Tensor) -> Tensor | None:
        """The MLP of a layer that a token skips whole adds nothing."""
        return None

    def cost_per_token(self, layer: int) -> float:
        if layer not in self.layers:
            return 0.0
        own = self.maps[str(layer)].flops()  # type: ignore[operator]
        return own + (self.leaving.flops() if layer == self.last else 0.0)

    # Training -----------------------------------------------------------------------------------------------------

    def losses(self, batch: GhostBatch) -> Tensor:
        """[cosine, mse, leaving]: means over tokens, heads and layers."""
        parts = []
        for layer in self.layers:
            for found, wanted in zip(self(layer, batch.entering), (batch.k[layer], batch.v[layer]), strict=True):
                f, w = found.float(), wanted.float()
                apart = 1 - torch.cosine_similarity(f, w, dim=-1)
                parts.append(torch.stack([apart.mean(), (f - w).pow(2).mean() / _variance(w)]))
        moved, goal = self.leave(batch.entering).float(), batch.leaving.float()
        off = (moved - goal).pow(2).mean() / _variance(goal - batch.entering.float())
        return torch.cat([torch.stack(parts).mean(dim=0), off.view(1)])

    def train_epoch(self, batches: Iterable[GhostBatch], optimizer: torch.optim.Optimizer) -> GhostLosses:
        """One pass over batches of the dense model's own K and V (`pipeline.distill.ghost_data.capture` makes them)."""
        self.requires_grad_(True)
        total, count, tokens = torch.zeros(3), 0, 0
        for batch in batches:
            found = self.losses(batch)
            optimizer.zero_grad(set_to_none=True)
            found.sum().backward()
            nn.utils.clip_grad_norm_(self.parameters(), 1.0)
            optimizer.step()
            total += found.detach().cpu()
            count, tokens = count + 1, tokens + batch.entering.shape[0]
        self.requires_grad_(False)
        if count == 0:
            raise InputError("no batch to train ghost K and V on")
        cosine, mse, leaving = (total / count).tolist()
        return GhostLosses(cosine, mse, leaving, tokens)

    # The file -----------------------------------------------------------------------------------------------------

    def save(self, path: Path, identity: ModelIdentity | None = None, recipe: dict[str, Any] | None = None) -> str:
        """Write the maps, which model they are for and how they were made; returns the file's sha256."""
        self.identity, self.recipe = identity or self.identity, recipe or self.recipe
        if self.identity is None:
            raise InputError("ghost K and V belong to one model: save(path, loaded.identity)")
        return save_tensors(
            path,
            {
                "schema_version": SCHEMA,
                "kind": KIND,
                "model": self.identity.model_dump(),
                "layers": list(self.layers),
                "shape": {"hidden_size": self.hidden_size, "heads": self.heads, "head_dim": self.head_dim,
                          "rank": self.rank},
                "maps": {key: value.detach().cpu().clone() for key, value in self.state_dict().items()},
                "recipe": self.recipe,
            },
        )  # fmt: skip

    @classmethod
    def load(cls, path: Path, identity: ModelIdentity | None = None) -> GhostKV:
        """Read a file without unpickling; one made for a model other than `identity` is refused."""
        found = load_tensors(path)
        if not isinstance(found, dict) or found.get("kind") != KIND or found.get("schema_version") != SCHEMA:
            raise InputError(
                f"{path} is not a ghost KV file of schema {SCHEMA}", hint="sedac distill --ghost-kv makes one"
            )
        model = ModelIdentity.model_validate(found["model"])
        if identity is not None:
            model.require_same(identity, str(path))
        ghost = cls(found["layers"], **found["shape"])
        try:
            ghost.load_state_dict(found["maps"])
        except RuntimeError as error:
            raise InputError(f"{path} is damaged: {str(error).splitlines()[-1].strip()}") from None
        if not all(torch.isfinite(p).all() for p in ghost.parameters()):
            raise InputError(f"{path} holds NaN or infinite values")
        ghost.identity, ghost.recipe = model, found["recipe"]
        return ghost.eval().requires_grad_(False)


def _variance(wanted: Tensor) -> Tensor:
    return wanted.var(dim=0).mean().clamp_min(1e-12)
