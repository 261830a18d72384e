"""What ghost K and V are worth: the same tokens away on the same text, with several things in their place.

full compute; MLPs skipped at equal cost (attention kept), with linear and, if given, trained stand-ins; the last K and V the
token made, copied; the linear start; trained. The last three move the state of a token that is away: all move the state of a token that is away by the linear start's map, the trained one by its own.

    rows = compare(loaded, held, trainer.sample(), gate, start, trained)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sedac_cli.costs import model_costs
from sedac_cli.gates.base import Gate, TokenState
from sedac_cli.gates.span import SpanGate
from sedac_cli.gpu.reference import kl_of_logits, row_chunks
from sedac_cli.models import LoadedModel
from sedac_cli.pipeline.distill.scan import gather, start
from sedac_cli.runtime.kv import recording
from sedac_cli.runtime.skip import skipping
from sedac_cli.standins import StandIn
from sedac_cli.standins.ghost import GhostKV
from sedac_cli.standins.lowrank import LowRank, LowRankStandIns
from sedac_cli.structure import Decoder

FULL, MLP, MLP_TRAINED = "full compute", "MLPs skipped, linear start", "MLPs skipped, trained"
COPIED, LINEAR, TRAINED = "last K,V copied", "ghosts, linear start", "ghosts, trained"


@dataclass(frozen=True)
class Compared:
    """`following`: predictions of tokens that run and have one before them that is away; `away`: of those away."""

    way: str
    flops_saved: float
    tokens: dict[str, int]
    ppl_ratio: dict[str, float]
    agreement: dict[str, float]
    kl: dict[str, float]


class Coded(Gate):
    """Who skips is written down: [B * T] of the coming pass, by layer."""

    name = "coded"

    def __init__(self, num_layers: int):
        super().__init__(num_layers)
        self.away: dict[int, Tensor] = {}

    def rule(self, layer: int, hidden: Tensor | None, state: TokenState) -> Tensor:
        return (~self.away[layer]).float() if layer in self.away else torch.ones_like(state.scale)


class CopiedKV:
    """K (before rotary: a copy takes its own position) and V of the last layer that the token ran."""

    def __init__(self, moved: GhostKV):
        self.layers, self.moved = moved.layers, moved
        self.k = self.v = torch.zeros(0)

    def rows(self, layer: int, x: Tensor) -> Tensor | None:
        return None

    def cost_per_token(self, layer: int) -> float:
        return self.moved.leaving.flops() if layer == self.layers[-1] else 0.0

    def __call__(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.k, self.v

    def leave(self, hidden: Tensor) -> Tensor:
        return self.moved.leave(hidden)


def mlps_at_equal_cost(
    loaded: LoadedModel, ghost: GhostKV, rank: int, context: int
) -> tuple[dict[int, float], list[float]]:
    """`equal_layers` for what a token that is away saves with this ghost; and what skipping each MLP saves."""
    costs = model_costs(loaded.decoder, context)
    size = loaded.decoder.hidden_size
    gain = [flops - LowRank(size, rank).flops() for flops in costs.mlp]
    whole = sum(costs.mlp[x] + costs.mixer[x] - ghost.cost_per_token(x) for x in ghost.layers)
    return equal_layers(loaded.decoder, ghost.layers, whole, gain), gain


def equal_layers(decoder: Decoder, layers: tuple[int, ...], wanted: float, gain: list[float]) -> dict[int, float]:
    """Which MLPs a token must skip, and the last one with what chance, to save `wanted` FLOPs: those of the span, then
    deeper ones but the last, then shallower ones but the first two."""
    first, last = layers[0], layers[-1]
    order = [*layers, *range(last + 1, decoder.num_layers - 1), *range(first - 1, 1, -1)]
    chosen: dict[int, float] = {}
    for layer in order:
        if wanted <= 0:
            break
        chosen[layer] = min(1.0, wanted / gain[layer])
        wanted -= chosen[layer] * gain[layer]
    return chosen


@torch.no_grad()
def compare(
    loaded: LoadedModel, windows: Tensor, fit: list[Tensor], gate: Gate, begun: GhostKV, trained: GhostKV, rank: int = 48, batch: int = 8,
    seed: int = 0, rival: StandIn | None = None,
) -> list[Compared]:  # fmt: skip
    """`windows` [N, T]: held-out text for the figures. `fit`: token ids the second way's stand-ins are fitted on, in closed
    form: it is at its linear start. `rival`: trained stand-ins of the same rank, for the same MLPs."""
    decoder, layers = loaded.decoder, trained.layers
    costs = model_costs(decoder, windows.shape[1])
    batches = [ids.long().to(decoder.device) for ids in windows.split(batch)]
    moments = gather(decoder, fit)
    instead = LowRankStandIns({x: start(m, rank).to(decoder.device) for x, m in moments.items()})
    spent = sum(trained.cost_per_token(x) for x in layers)
    whole = sum(costs.mlp[x] + costs.mixer[x] for x in layers)
    mlps, gain = mlps_at_equal_cost(loaded, trained, rank, windows.shape[1])
    copied, coded = CopiedKV(begun), Coded(decoder.num_layers)
    span = SpanGate(coded, layers)
    ways: dict[str, tuple[Gate, StandIn]] = {MLP: (coded, instead)}
    ways |= {} if rival is None else {MLP_TRAINED: (coded, rival)}
    ways |= {COPIED: (span, copied), LINEAR: (span, begun), TRAINED: (span, trained)}
    generator = torch.Generator().manual_seed(seed)
    sums = {way: torch.zeros(3, 5, dtype=torch.float64) for way in ways}
    gone, tokens = 0, 0
    for ids in batches:
        with skipping(
            loaded.model,
            SpanGate(gate, layers),
            trained,
            decoder=decoder,
            keep_passes=True,
            prefill=gate.guards.prefill,
        ) as run:
            decoder.last_hidden(ids)
        away = run.passes[0].skipped > 0
        gone, tokens = gone + int(away.sum()), tokens + away.numel()
        with recording(decoder, (layers[0] - 1,)) as seen:
            dense = decoder.last_hidden(ids)
        copied.k, copied.v = seen[layers[0] - 1].key[away], seen[layers[0] - 1].value[away]
        before = (away.long().cumsum(dim=1) - away.long()) > 0
        kinds = torch.stack([~away & before, away, torch.ones_like(away)])[:, :, :-1].flatten(1)
        coin = torch.rand(away.shape, generator=generator).to(away.device)
        for way, (who, standin) in ways.items():
            shares = mlps if who is coded else {layers[0]: 1.0}
            coded.away = {x: (away & (coin < share)).flatten() for x, share in shares.items()}
            with skipping(loaded.model, who, standin, decoder=decoder):
                found = decoder.last_hidden(ids)
            sums[way] += _sums(dense, found, ids, kinds, loaded).cpu()
    rate = gone / max(1, tokens)
    skipped = sum(share * gain[x] for x, share in mlps.items())
    saved = {MLP: skipped, MLP_TRAINED: skipped, COPIED: whole - copied.cost_per_token(layers[-1])}
    return [
        _full(sums[TRAINED]),
        *(_row(way, rate * saved.get(way, whole - spent) / costs.total, sums[way]) for way in ways),
    ]


def _sums(dense: Tensor, found: Tensor, ids: Tensor, kinds: Tensor, loaded: LoadedModel) -> Tensor:
    """[kind, (tokens, nll dense, nll found, agreements, KL)] over predictions; `kinds` is [kind, B * (T - 1)]."""
    d, f, y = dense[:, :-1].flatten(0, 1), found[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    parts = []
    for rows in row_chunks(d.shape[0], loaded.decoder.vocab_size):
        a, b = loaded.decoder.head(d[rows]).float(), loaded.decoder.head(f[rows]).float()
        nll = [torch.nn.functional.cross_entropy(x, y[rows], reduction="none") for x in (a, b)]
        agree = (a.argmax(-1) == b.argmax(-1)).float()
        parts.append(torch.stack([torch.ones_like(agree), *nll, agree, kl_of_logits(a, b)], dim=1))
    return kinds.double() @ torch.cat(parts).double()


KINDS = ("following", "away", "all")


def _row(way: str, saved: float, sums: Tensor) -> Compared:
    count = sums[:, 0].clamp_min(1)
    figures = {kind: (sums[i] / count[i]).tolist() for i, kind in enumerate(KINDS)}
    return Compared(
        way, saved,
        tokens={kind: int(sums[i, 0]) for i, kind in enumerate(KINDS)},
        ppl_ratio={kind: math.exp(min(50.0, f[2] - f[1])) for kind, f in figures.items()},
        agreement={kind: f[3] for kind, f in figures.items()},
        kl={kind: f[4] for kind, f in figures.items()},
    )  # fmt: skip


def _full(sums: Tensor) -> Compared:
    """Full compute against itself: what the other rows are measured by."""
    itself = sums.clone()
    itself[:, 2], itself[:, 3], itself[:, 4] = sums[:, 1], sums[:, 0], 0.0
    return _row(FULL, 0.0, itself)
