"""Before training: the closed-form start of every stand-in, and which layers bear being skipped at all.

One pass over some text gathers the moments of every MLP's input and output; ridge regression gives the best linear map.
Then each layer alone is replaced by its stand-in, for every token, and the harm (KL to the dense model) is measured.

    moments = gather(decoder, batches); standin = start(moments[7], rank=192)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sedac_cli.gpu.reference import linear_kl
from sedac_cli.pipeline.world import World
from sedac_cli.standins.lowrank import LowRank
from sedac_cli.structure import Decoder


@dataclass
class Moments:
    """Sums over tokens of [x, 1]^T [x, 1], [x, 1]^T y and y^T y for one MLP, float64."""

    xx: Tensor
    xy: Tensor
    tokens: int = 0
    yy: float = 0.0

    @classmethod
    def of(cls, inputs: int, outputs: int, device: torch.device) -> Moments:
        kind: Any = {"dtype": torch.float64, "device": device}
        return cls(torch.zeros(inputs + 1, inputs + 1, **kind), torch.zeros(inputs + 1, outputs, **kind))

    def joined(self, world: World) -> None:
        """From here on, the sums over the tokens of all processes."""
        self.xx, self.xy = world.sum(self.xx), world.sum(self.xy)
        counts = torch.tensor([self.tokens, self.yy], dtype=torch.float64, device=self.xx.device)
        tokens, self.yy = world.sum(counts).tolist()
        self.tokens = int(tokens)

    def add(self, x: Tensor, y: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).float()
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        self.xx += (x.T @ x).double()
        self.xy += (x.T @ y.reshape(x.shape[0], -1).float()).double()
        self.yy += float(y.float().pow(2).sum(dtype=torch.float64))
        self.tokens += x.shape[0]


@torch.no_grad()
def gather(decoder: Decoder, batches: Iterable[Tensor], world: World | None = None) -> dict[int, Moments]:
    """Moments of every layer's MLP on the dense model's own states. `batches` are token ids [B, T]; each process brings
    its own, and has the moments of all."""
    world = world or World()
    size, device = decoder.hidden_size, decoder.device
    moments = {layer: Moments.of(size, size, device) for layer in range(decoder.num_layers)}
    with ExitStack() as hooks:
        for branch in decoder.branches:

            def see(module: nn.Module, args: tuple[Tensor], y: Tensor, layer: int = branch.layer) -> None:
                moments[layer].add(args[0], y)

            hooks.callback(branch.entry.register_forward_hook(see).remove)
        for ids in batches:
            decoder.last_hidden(ids)
    for found in moments.values():
        found.joined(world)
    return moments


def start(moments: Moments, rank: int, ridge: float = 1e-3) -> LowRank:
    """The stand-in that is the best low-rank linear map, ridge-regularized."""
    solution = solve(moments, ridge)
    scale = (moments.xx.diagonal()[:-1] / max(1, moments.tokens)).clamp_min(1e-8).sqrt()
    return LowRank.from_linear(solution[:-1].cpu(), solution[-1].float().cpu(), rank, scale.cpu())


def spread_ranks(
    moments: dict[int, Moments], harm: dict[int, float], layers: tuple[int, ...], rank: int, ridge: float = 1e-3
) -> dict[int, int]:
    """The same total rank, where it takes most harm away: pairs of units go to the directions of largest
    harm_l / error_l * s^2, with s the direction's singular value and error_l what the stand-in of uniform rank leaves of the
    MLP's output. No layer gets fewer than a quarter or more than four times the uniform rank."""
    pairs, size = rank // 2, next(iter(moments.values())).xx.shape[0] - 1
    least, most = max(1, pairs // 4), min(4 * pairs, size)
    gains = []
    for layer in layers:
        found = moments[layer]
        n = max(1, found.tokens)
        solution = solve(found, ridge)
        scale = (found.xx.diagonal()[:-1] / n).clamp_min(1e-8).sqrt()
        u, s, v = torch.linalg.svd(scale.unsqueeze(1) * solution[:-1], full_matrices=False)
        uniform = torch.cat([(u[:, :pairs] * s[:pairs]) @ v[:pairs] / scale.unsqueeze(1), solution[-1:]])
        left = found.yy - 2 * (uniform * found.xy).sum() + (uniform * (found.xx @ uniform)).sum()
        gains.append(harm[layer] / float(left.clamp_min(1e-12) / n) * s[:most].pow(2).cpu())
    table = torch.stack(gains)
    table[:, :least] = math.inf
    chosen = table.flatten().topk(pairs * len(layers)).indices // table.shape[1]
    return {layer: 2 * int((chosen == place).sum()) for place, layer in enumerate(layers)}


def solve(moments: Moments, ridge: float) -> Tensor:
    """[inputs + 1, outputs], float64: the linear map and, last, its offset; the offset is not held down."""
    n = max(1, moments.tokens)
    xx, xy = moments.xx / n, moments.xy / n
    penalty = torch.eye(xx.shape[0], dtype=xx.dtype, device=xx.device) * ridge * xx.diagonal()[:-1].mean()
    penalty[-1, -1] = 0
    return torch.linalg.solve(xx + penalty, xy)


@torch.no_grad()
def harm_scan(
    decoder: Decoder, standins: dict[int, LowRank], batches: list[Tensor], world: World | None = None
) -> dict[int, float]:
    """Mean KL (nats) to the dense model when one layer's MLP is replaced for every token, layer by layer."""
    dense = [decoder.last_hidden(ids).flatten(0, 1) for ids in batches]
    harm = {}
    for branch in decoder.branches:
        standin = standins[branch.layer]
        handle = branch.exit.register_forward_hook(lambda m, args, y, s=standin: s(args[0]).to(y.dtype))
        try:
            total = [
                linear_kl(d, decoder.last_hidden(ids).flatten(0, 1), decoder.head, decoder.vocab_size).mean()
                for d, ids in zip(dense, batches, strict=True)
            ]
        finally:
            handle.remove()
        harm[branch.layer] = float((world or World()).mean(torch.stack(total).mean()))
    return harm


def skippable(harm: dict[int, float], factor: float = 6.0) -> list[int]:
    """Layers whose harm is within `factor` of the median one; the routers choose among them token by token."""
    limit = factor * sorted(harm.values())[len(harm) // 2]
    return [layer for layer, value in harm.items() if value <= limit]
