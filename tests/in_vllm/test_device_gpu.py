"""The session on CUDA, without vLLM: what a captured pass does at replay is what the same gate does row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mlps import LAYERS, WIDTH, Mlp, by_hand, make_layers, normed, routers, rows, run_layers, standins

from sedac_cli.gates.adaptive import AdaptiveThresholds
from sedac_cli.gates.base import Guards
from sedac_cli.gates.cascade import CascadeGate
from sedac_cli.gates.learned import LearnedGate
from sedac_cli.gates.stability import StabilityGate
from sedac_cli.gpu.skinny import has_hopper_products
from sedac_cli.probes import LREProbe
from sedac_cli.runtime.plan import Plan
from sedac_cli.standins import ZeroStandIn
from sedac_cli.vllm.forced import ForcedGate
from sedac_cli.vllm.settings import read_settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the session cannot run here"),
]


def make_session(gate, standin=None, mlp="nodes", full=True, joined=True, layers=None, **size):
    """`joined`: norms and routers are one launch, if there are routers."""
    from sedac_cli.vllm.device import DeviceSession

    layers = layers or make_layers("cuda", **size)
    settings = read_settings({"gate": "never", "mlp": mlp}, {})
    session = DeviceSession(settings, Plan(gate, standin or ZeroStandIn()), layers, torch.device("cuda"), 1024)
    session.forward = {i: layers[i].mlp.forward for i in session.gated}
    session.packs = session.packing_works()
    if joined:
        session.join_norms()
    session.norm_forward = {i: norm.module.forward for i, norm in session.norms.items()}
    session.capture.whole = lambda: full
    return session, layers


def test_unasked_kernels_are_chosen_where_they_give_what_the_mlp_gives():
    hopper = torch.cuda.get_device_capability()[0] == 9
    session, layers = make_session(ForcedGate(LAYERS, []), mlp="auto")
    assert session.use_kernels == hopper
    assert session.other_results() is None
    layers = make_layers("cuda")
    layers[0].mlp.forward = lambda x: Mlp.forward(layers[0].mlp, x) * 1.1  # looks like one of two matrices, and is not
    session, _ = make_session(ForcedGate(LAYERS, []), mlp="auto", layers=layers)
    assert not session.use_kernels
    assert session.other_results() == "the kernels miss vLLM's own MLP by 0.091"


def capture(session, layers, x):
    session.begin(None)
    run_layers(session, layers, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="relaxed"):
        out = run_layers(session, layers, x)
    return graph, out


def probe(layer):
    torch.manual_seed(10 + layer)
    return LREProbe(WIDTH, 16).cuda().requires_grad_(False)


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
@pytest.mark.parametrize("count", [1, 5, 20, 40])
@pytest.mark.parametrize("name", list(GATES))
@pytest.mark.parametrize("mlp", ["nodes", "kernels"])
@torch.no_grad()
def test_a_replay_follows_the_gate(name, count, full, mlp):
    make = GATES[name]
    for standin in (ZeroStandIn(), standins("cuda")):
        session, layers = make_session(make(), standin, mlp, full)
        assert list(session.norms) == (session.gated if name.startswith("routers") else [])
        x = torch.randn(count, WIDTH, device="cuda", dtype=torch.bfloat16)
        graph, out = capture(session, layers, x)
        for step in (rows(count), rows(count, dense=np.arange(count) == 0), rows(count, first=0)):
            x.copy_(torch.randn(count, WIDTH))
            session.begin(step)
            graph.replay()
            expected = by_hand(make().to("cuda"), standin, layers, x, step)
            torch.testing.assert_close(out.float(), expected.float(), rtol=2e-2, atol=6e-2)
        assert session.status()["tokens"] == 3 * count


@pytest.mark.parametrize("size", [{}, {"width": 3584, "inner": 18944}], ids=["small", "7B"])
@pytest.mark.parametrize("count", [1, 8, 24])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("joined", [True, False])
@torch.no_grad()
def test_an_mlp_that_races_its_router_does_what_it_says(joined, full, count, size):
    """Decisions that change from step to step and from layer to layer, so that a flag, a score or an output left over from the
    last step would be seen. Where all rows decide alike the same session without a graph must say the same, counters included."""
    width = size.get("width", WIDTH)
    standin = standins("cuda", width, rank=192 if size else 6, layers=[1, 3])
    session, layers = make_session(LearnedGate(LAYERS, routers(width), 0.0), standin, "kernels", full, joined, **size)
    gate = session.gate
    x = torch.randn(count, width, device="cuda", dtype=torch.bfloat16)
    graph, out = capture(session, layers, x)
    roundings = 0.16  # five of values from 4 to 8
    seen = set()
    for number in range(60):
        limit, alike = (0.0, -1e9, 0.0, 1e9)[number % 4], number % 8 < 4 or count == 1
        session.set_thresholds([limit])
        x.copy_(torch.randn(1 if alike else count, width))
        step, off = rows(count), []
        expected = by_hand(gate, standin, layers, x, step, off)
        if limit == 0.0 and nearest(gate, layers, x, standin) < 0.2:
            continue  # so close to the threshold rounding may decide
        seen.add(tuple(off))
        session.reset()
        session.begin(step)
        graph.replay()
        torch.testing.assert_close(out.float(), expected.float(), rtol=2e-2, atol=roundings)
        counted = session.status()["skipped"]
        assert counted == [count if layer in off else 0 for layer in range(LAYERS)], (number, off)
        if not alike and limit == 0.0:
            continue  # a graph runs an MLP for all rows if one needs it
        session.reset()
        session.begin(step)
        alone = run_layers(session, layers, x)
        session.end()
        torch.testing.assert_close(out.float(), alone.float(), rtol=2e-2, atol=roundings)
        assert session.status()["skipped"] == counted
    assert {(), (1, 2, 3)} < seen


def nearest(gate, layers, x, standin):
    """How close any score comes to the threshold 0 on the way that a graph takes."""
    found = []
    for layer in layers:
        n = normed(layer, x)
        score = gate.routers[layer.index](n) if layer.index in gate.routers else torch.full_like(n[:, 0].float(), -9.0)
        found.append(float(score.abs().min()))
        instead = standin.rows(layer.index, n) if bool((score > 0).all()) else layer.mlp(n)
        x = x if instead is None else x + instead
    return min(found)


@pytest.mark.parametrize("joined", [True, False])
@torch.no_grad()
def test_graphs_of_several_sizes_race_with_the_same_memory(joined):
    """Flags, scores and scratch belong to all of them; what they leave behind in one graph must not be seen by the next."""
    gate, standin = LearnedGate(LAYERS, routers(), 0.0), standins("cuda")
    session, layers = make_session(gate, standin, "kernels", joined=joined)
    made = []
    for count in (40, 32, 8, 4, 1):  # 40 in nodes
        x = torch.randn(count, WIDTH, device="cuda", dtype=torch.bfloat16)
        made.append((count, x, *capture(session, layers, x)))
    for number in range(12):
        session.set_thresholds([(-1e9, 1e9)[number % 2]])
        for count, x, graph, out in made:
            x.copy_(torch.randn(count, WIDTH))
            session.begin(rows(count))
            graph.replay()
            expected = by_hand(gate, standin, layers, x, rows(count))
            torch.testing.assert_close(out.float(), expected.float(), rtol=2e-2, atol=6e-2)
    skipped = 6 * sum(count for count, *_ in made)
    assert session.status()["skipped"] == [0, skipped, skipped, skipped]


@pytest.fixture
def launches(monkeypatch):
    """The names of our own launches, in order."""
    from sedac_cli.gpu import conditional, decode, probe, skinny

    found = []
    for module in (conditional, decode, probe, skinny):
        launch = module.launch

        def noted(family, entry, constants, *args, launch=launch, **more):
            found.append(entry)
            return launch(family, entry, constants, *args, **more)

        monkeypatch.setattr(module, "launch", noted)
    return found


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("mlp", ["nodes", "kernels"])
@torch.no_grad()
def test_what_a_learned_gate_launches(launches, mlp, full):
    """Per gated layer one launch ahead of the MLP where rows are few, else the norm and the router; none of their own where a norm
    is not known."""
    layers = make_layers("cuda")
    layers[2].module.norm.variance_size_override = WIDTH // 2
    session, layers = make_session(LearnedGate(LAYERS, routers(), 0.0), mlp=mlp, full=full, layers=layers)
    assert list(session.norms) == [1, 3]
    linear = "batch_hopper" if has_hopper_products(torch.device("cuda")) else "batch"
    behind = [linear, linear] if mlp == "kernels" else []
    for count in (32, 33):
        x = torch.randn(count, WIDTH, device="cuda", dtype=torch.bfloat16)
        session.begin(None)
        run_layers(session, layers, x)
        launches.clear()
        torch.cuda.synchronize()
        with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="relaxed"):
            run_layers(session, layers, x)
        if count == 32:
            assert launches == ["norm_route", *behind, "router_few", *behind, "norm_route", *behind]
        else:
            assert launches == ["rms_norm", "router", "router", "rms_norm", "router"]


@pytest.mark.parametrize("count", [1, 8, 32, 33, 600])
@torch.no_grad()
def test_a_step_without_a_graph_norms_as_a_graph_does(count):
    """The same stream to the bit, which is not written into; and it is the sum, rounded, and its norm."""
    session, layers = make_session(LearnedGate(LAYERS, routers(), 0.0), mlp="kernels")
    hidden, residual = (torch.randn(count, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    kept = hidden.clone(), residual.clone()
    session.begin(None)
    for layer in session.gated:
        session.mlp(layer, session.norm(layer, hidden, residual)[0])
    torch.cuda.synchronize()
    graph, found = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph, capture_error_mode="relaxed"):
        for layer in session.gated:
            found.append(session.norm(layer, hidden, residual))
            session.mlp(layer, found[-1][0])
    session.begin(rows(count))
    graph.replay()
    for layer, (normed_rows, total) in zip(session.gated, found, strict=True):
        alone, sum_alone = session.norm(layer, hidden, residual)
        assert torch.equal(total, hidden + residual)
        assert torch.equal(sum_alone, total)
        assert torch.equal(normed_rows, alone)
        expected = layers[layer].module.norm(hidden + residual)
        torch.testing.assert_close(alone.float(), expected.float(), rtol=2**-6, atol=2**-7)
    assert torch.equal(hidden, kept[0])
    assert torch.equal(residual, kept[1])


@torch.no_grad()
def test_all_on_is_the_same_to_the_bit_and_all_off_leaves_the_stream():
    session, layers = make_session(ForcedGate(LAYERS, []))
    x = torch.randn(7, WIDTH, device="cuda", dtype=torch.bfloat16)
    graph, out = capture(session, layers, x)
    plain = x.clone()
    for layer in layers:
        plain = plain + layer.mlp(normed(layer, plain))
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
    for count in (40, 32, 8, 1):
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
    risk = gate.probes[1](x + layers[0].mlp(normed(layers[0], x)))
    session.set_thresholds([float(risk.median())])
    session.begin(rows(700))
    run_layers(session, layers, x)
    session.end()
    skipped = session.status()["skipped"]
    assert skipped[1:] == [skipped[1]] * 3
    assert 330 < skipped[1] < 370
