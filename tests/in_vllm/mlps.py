"""Layers of a norm and an MLP, built as vLLM builds them, with what a gate needs to decide about them and to stand in."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from sedac_cli.gates.learned import Router
from sedac_cli.gpu import decode_reference
from sedac_cli.standins.lowrank import LowRank, LowRankStandIns
from sedac_cli.vllm.session import StepRows
from sedac_cli.vllm.surgery import Layer

LAYERS, WIDTH, INNER = 4, 256, 512


class Linear(nn.Module):
    def __init__(self, rows: int, columns: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, columns).bfloat16() / columns**0.5, requires_grad=False)
        self.quant_method = type("UnquantizedLinearMethod", (), {})()
        self.reduce_results, self.tp_size, self.tp_rank, self.bias = True, 1, 0, None

    def forward(self, x):
        return nn.functional.linear(x, self.weight)


class SiluAndMul(nn.Module):
    def forward(self, x):
        gate, up = x.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


class Mlp(nn.Module):
    def __init__(self, width: int = WIDTH, inner: int = INNER):
        super().__init__()
        self.gate_up_proj, self.down_proj, self.act_fn = Linear(2 * inner, width), Linear(width, inner), SiluAndMul()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_up_proj(x)))


class RMSNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(width).bfloat16(), requires_grad=False)
        self.variance_epsilon = 1e-6

    def forward(self, x, residual=None):
        """In place, as vLLM's kernel does it."""
        if residual is None:
            return decode_reference.rms_norm(x, self.weight, self.variance_epsilon)
        normed, total = decode_reference.add_rms_norm(x, residual, self.weight, self.variance_epsilon)
        return x.copy_(normed), residual.copy_(total)


class Block(nn.Module):
    """A decoder layer as vLLM writes them, whose attention gives what it is given."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.attention, self.norm, self.mlp = nn.Identity(), RMSNorm(width), Mlp(width, inner)

    def forward(self, hidden_states, residual):
        hidden_states, residual = self.norm(self.attention(hidden_states), residual)
        return self.mlp(hidden_states), residual


def make_layers(device="cpu", width=WIDTH, inner=INNER):
    torch.manual_seed(0)
    with torch.device(device):
        blocks = [Block(width, inner) for _ in range(LAYERS)]
    return [Layer(i, block, block.mlp, 0, 1) for i, block in enumerate(blocks)]


def normed(layer, x):
    return layer.module.norm(x)


def run_layers(session, layers, x):
    """The layers as vLLM runs them: the stream is what an MLP gave and, apart from it, what came before."""
    hidden, residual = torch.zeros_like(x), x.clone()
    for layer in layers:
        if layer.index in session.looks:
            session.look(layer.index, hidden, residual)
        if layer.index in session.norms:
            n, residual = session.norm(layer.index, hidden, residual)
        else:
            n, residual = layer.module.norm(hidden, residual)
        hidden = session.mlp(layer.index, n) if layer.index in session.gated else layer.mlp(n)
    return hidden + residual


def rows(count, first=20, **more):
    return StepRows(np.arange(count, dtype=np.int32) + first, np.zeros(count, dtype=bool), **more)


def by_hand(gate, standin, layers, x, step, off=None):
    """The rule of a graph: an MLP runs for all rows if any row needs it. `off`: a list that takes the layers that did not."""
    count = len(step.position)
    force = torch.from_numpy(step.dense).to(x.device) if step.dense is not None else None
    state = gate.start(count, x.device, position=torch.from_numpy(step.position).to(x.device), force=force)
    for layer in layers:
        n = normed(layer, x)
        gate.decide(layer.index, n if gate.looks_at == "mlp" else x, state)
        if bool((state.scale[:count] > 0).any()):
            x = x + layer.mlp(n)
            continue
        if off is not None:
            off.append(layer.index)
        instead = standin.rows(layer.index, n)
        x = x if instead is None else x + instead
    return x


def routers(width=WIDTH):
    torch.manual_seed(5)
    made = {layer: Router(width, 4).requires_grad_(False) for layer in range(1, LAYERS)}
    for router in made.values():
        for parameter in router.parameters():
            parameter.normal_(0, 0.2)
    return made


def standins(device="cpu", width=WIDTH, rank=8, layers=range(1, LAYERS)):
    torch.manual_seed(2)
    lows = {i: LowRank(width, rank).to(device).requires_grad_(False) for i in layers}
    for low in lows.values():
        for parameter in low.parameters():
            parameter.normal_(0, 0.1)
    return LowRankStandIns(lows)
