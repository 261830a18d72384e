"""The session on CUDA, without vLLM: what a captured pass does at replay is what the same gate does row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from sedac_cli.gates.adaptive import AdaptiveThresholds
from sedac_cli.gates.base import Guards
from sedac_cli.gates.cascade import CascadeGate
from sedac_cli.gates.learned import LearnedGate, Router
from sedac_cli.gates.stability import StabilityGate
from sedac_cli.probes import LREProbe
from sedac_cli.runtime.plan import Plan
from sedac_cli.standins import ZeroStandIn
from sedac_cli.standins.lowrank import LowRank, LowRankStandIns
from sedac_cli.vllm.forced import ForcedGate
from sedac_cli.vllm.session import StepRows
from sedac_cli.vllm.settings import read_settings
from sedac_cli.vllm.surgery import Layer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the session cannot run here"),
]
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
    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.down_proj, self.act_fn = Linear(2 * INNER, WIDTH), Linear(WIDTH, INNER), SiluAndMul()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_up_proj(x)))


def make_session(gate, standin=None, mlp="nodes", full=True):
    from sedac_cli.vllm.device import DeviceSession

    torch.manual_seed(0)
    layers = [Layer(i, nn.Identity(), Mlp().cuda(), 0, None) for i in range(LAYERS)]
    settings = read_settings({"gate": "never", "mlp": mlp}, {})
    session = DeviceSession(settings, Plan(gate, standin or ZeroStandIn()), layers, torch.device("cuda"), 1024)
    session.forward = {i: layers[i].mlp.forward for i in session.gated}
    session.packs = session.packing_works()
    session.capture.whole = lambda: full
    return session, layers


def run_layers(session, layers, x):
    """A model of nothing but MLPs: each layer adds its own to the stream."""
    for layer in layers:
        if layer.index in session.looks:
            session.look(layer.index, x, None)
        normed = nn.functional.layer_norm(x.float(), (WIDTH,)).to(x.dtype)
        x = x + (session.mlp(layer.index, normed) if layer.index in session.gated else layer.mlp(normed))
    return x


def rows(count, first=20, **more):
    return StepRows(np.arange(count, dtype=np.int32) + first, np.zeros(count, dtype=bool), **more)


def capture(session, layers, x):
    session.begin(None)
    run_layers(session, layers, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="relaxed"):
        out = run_layers(session, layers, x)
    return graph, out


def by_hand(gate, standin, layers, x, step):
    """The rule of a graph: an MLP runs for all rows if any row needs it."""
    count = len(step.position)
    force = torch.from_numpy(step.dense).cuda() if step.dense is not None else None
    state = gate.start(count, "cuda", position=torch.from_numpy(step.position).cuda(), force=force)
    for layer in layers:
        normed = nn.functional.layer_norm(x.float(), (WIDTH,)).to(x.dtype)
        gate.decide(layer.index, normed if gate.looks_at == "mlp" else x, state)
        if bool((state.scale > 0).any()):
            x = x + layer.mlp(normed)
        else:
            instead = standin.rows(layer.index, normed)
            x = x if instead is None else x + instead
    return x


def probe(layer):
    torch.manual_seed(10 + layer)
    return LREProbe(WIDTH, 16).cuda().requires_grad_(False)


def routers():
    torch.manual_seed(5)
    made = {layer: Router(WIDTH, 4).requires_grad_(False) for layer in range(1, LAYERS)}
    for router in made.values():
        for parameter in router.parameters():
            parameter.normal_(0, 0.2)
    return made


GATES = {
    "all on": lambda: ForcedGate(LAYERS, []),
    "first off": lambda: ForcedGate(LAYERS, [0]),
    "two off": lambda: ForcedGate(LAYERS, [1, 3]),
    "all off": lambda: ForcedGate(LAYERS, [0, 1, 2, 3]),
    "exit at the second checkpoint": lambda: CascadeGate(LAYERS, {1: probe(1), 2: probe(2)}, {1: 0.0, 2: 1e9}),
    "exit at the first": lambda: CascadeGate(LAYERS, {1: probe(1), 2: probe(2)}, {1: 1e9, 2: 0.0}),
    "no exit": lambda: CascadeGate(LAYERS, {1: probe(1), 2: probe(2)}, {1: 0.0, 2: 0.0}),
    "exit but the last layer": lambda: CascadeGate(LAYERS, {1: probe(1)}, {1: 1e9}, guards=Guards(last=1)),
    "sinks": lambda: CascadeGate(LAYERS, {1: probe(1)}, {1: 1e9}, guards=Guards(sinks=4)),
    "routers say skip": lambda: LearnedGate(LAYERS, routers(), -1e9),
    "routers say run": lambda: LearnedGate(LAYERS, routers(), 1e9),
    "routers decide": lambda: LearnedGate(LAYERS, routers(), 0.0),
    "torch rule": lambda: StabilityGate(LAYERS, tau=-0.9, k=1, min_layer=2),
}


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("count", [1, 5, 40])
@pytest.mark.parametrize("name", list(GATES))
@pytest.mark.parametrize("mlp", ["nodes", "kernels"])
@torch.no_grad()
def test_a_replay_follows_the_gate(name, count, full, mlp):
    make = GATES[name]
    torch.manual_seed(2)
    lows = {i: LowRank(WIDTH, 8).cuda().requires_grad_(False) for i in range(1, LAYERS)}
    for low in lows.values():
        for parameter in low.parameters():
            parameter.normal_(0, 0.1)
    for standin in (ZeroStandIn(), LowRankStandIns(lows)):
        session, layers = make_session(make(), standin, mlp, full)
        x = torch.randn(count, WIDTH, device="cuda", dtype=torch.bfloat16)
        graph, out = capture(session, layers, x)
        for step in (rows(count), rows(count, dense=np.arange(count) == 0), rows(count, first=0)):
            x.copy_(torch.randn(count, WIDTH))
            session.begin(step)
            graph.replay()
            expected = by_hand(make().to("cuda"), standin, layers, x, step)
            torch.testing.assert_close(out.float(), expected.float(), rtol=2e-2, atol=6e-2)
        assert session.status()["tokens"] == 3 * count


@torch.no_grad()
def test_all_on_is_the_same_to_the_bit_and_all_off_leaves_the_stream():
    session, layers = make_session(ForcedGate(LAYERS, []))
    x = torch.randn(7, WIDTH, device="cuda", dtype=torch.bfloat16)
    graph, out = capture(session, layers, x)
    plain = x.clone()
    for layer in layers:
        plain = plain + layer.mlp(nn.functional.layer_norm(plain.float(), (WIDTH,)).to(x.dtype))
    session.begin(rows(7))
    graph.replay()
    assert torch.equal(out, plain)
    session.force([0, 1, 2, 3])
    session.begin(rows(7))
    graph.replay()
    assert torch.equal(out, x)
    assert session.status()["skipped"] == [7] * LAYERS


@torch.no_grad()
def test_graphs_of_several_sizes_share_the_bodies_memory():
    session, layers = make_session(ForcedGate(LAYERS, [1]))
    made = []
    for count in (32, 8, 1):
        x = torch.randn(count, WIDTH, device="cuda", dtype=torch.bfloat16)
        made.append((count, x, *capture(session, layers, x)))
    for _ in range(2):
        for count, x, graph, out in made:
            session.begin(rows(count))
            graph.replay()
            expected = by_hand(ForcedGate(LAYERS, [1]).to("cuda"), ZeroStandIn(), layers, x, rows(count))
            torch.testing.assert_close(out, expected, rtol=0, atol=0)


@torch.no_grad()
def test_padding_decides_nothing():
    session, layers = make_session(CascadeGate(LAYERS, {1: probe(1)}, {1: 1e9}))
    x = torch.randn(8, WIDTH, device="cuda", dtype=torch.bfloat16)
    graph, _ = capture(session, layers, x)
    session.begin(rows(3))
    graph.replay()
    assert session.status()["skipped"] == [0, 3, 3, 3]
    session.begin(rows(8, dense=np.arange(8) == 7))
    graph.replay()
    assert session.status()["skipped"] == [0, 3, 3, 3]


@torch.no_grad()
def test_adaptive_thresholds_learn_at_every_replay():
    gate = CascadeGate(LAYERS, {1: probe(1)}, AdaptiveThresholds({1: 0.5}, calibration_steps=8))
    session, layers = make_session(gate)
    x = torch.randn(4, WIDTH, device="cuda", dtype=torch.bfloat16)
    graph, _ = capture(session, layers, x)
    assert gate.adaptive is not None
    assert int(gate.adaptive._seen[0]) == 0, "a warm-up must not teach"
    for _ in range(20):
        x.copy_(torch.randn(4, WIDTH))
        session.begin(rows(4))
        graph.replay()
    torch.cuda.synchronize()
    assert int(gate.adaptive._seen[0]) == 80
    assert float(gate.adaptive.limits[0]) > 0


@torch.no_grad()
def test_steps_without_a_graph_launch_nothing_where_the_host_knows():
    session, layers = make_session(ForcedGate(LAYERS, [1, 3]))
    launched = []
    for index, forward in list(session.forward.items()):
        session.forward[index] = lambda x, index=index, forward=forward: launched.append(index) or forward(x)
    x = torch.randn(700, WIDTH, device="cuda", dtype=torch.bfloat16)
    for dense, off in (
        (None, [1, 3]),
        (np.arange(700) == 5, []),
    ):  # a row that opted out is an exception: all are asked
        launched.clear()
        step = rows(700, dense=dense)
        session.begin(step)
        out = run_layers(session, layers, x)
        session.end()
        if not off:
            continue
        assert launched == [0, 2]
        torch.testing.assert_close(out, by_hand(ForcedGate(LAYERS, off).to("cuda"), ZeroStandIn(), layers, x, step))
        assert session.status()["skipped"] == [0, 700, 0, 700]
    assert session.status()["skipped"] == [0, 1399, 0, 1399]
    assert session.settled()


@torch.no_grad()
def test_steps_without_a_graph_decide_row_by_row():
    gate = CascadeGate(LAYERS, {1: probe(1)}, {1: 0.0})
    session, layers = make_session(gate)
    assert session.packs
    x = torch.randn(700, WIDTH, device="cuda", dtype=torch.bfloat16)
    risk = gate.probes[1](x + layers[0].mlp(nn.functional.layer_norm(x.float(), (WIDTH,)).to(x.dtype)))
    session.set_thresholds([float(risk.median())])
    session.begin(rows(700))
    run_layers(session, layers, x)
    session.end()
    skipped = session.status()["skipped"]
    assert skipped[1:] == [skipped[1]] * 3
    assert 330 < skipped[1] < 370
