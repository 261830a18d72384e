"""Conditional nodes on a GPU: a body runs exactly when its condition says so, however the condition is set."""

from __future__ import annotations

import pytest
import torch
from cases import Probe, assert_close, counters_come_back, poison, router_of  # noqa: F401 - one is a fixture

from sedac_cli.gpu.conditional import ConditionalGraph
from sedac_cli.gpu.probe import ProbeWeights, RouterWeights, probe_risk, router_score

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("counters_come_back"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernels cannot run here"),
]

PATTERNS = ([1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1])


def layers_and_input():
    layers = [torch.nn.Linear(64, 64, device="cuda").requires_grad_(False) for _ in range(4)]
    return layers, torch.randn(3, 64, device="cuda")


def test_if_nodes_run_what_their_flag_says():
    layers, x = layers_and_input()
    nodes = ConditionalGraph()
    flags = torch.ones(4, dtype=torch.int32, device="cuda")
    nodes.warm(lambda: layers[0](x))
    for layer in layers:
        layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="relaxed"):
        conditions = nodes.conditions(4)
        conditions.set(flags)
        h = x.clone()
        for i, layer in enumerate(layers):
            y = torch.zeros_like(h)
            with conditions.body(i):
                y.copy_(torch.tanh(layer(h)))
            h = h + y
    for pattern in (*PATTERNS, PATTERNS[0]):
        flags.copy_(torch.tensor(pattern))
        graph.replay()
        expected = x.clone()
        for on, layer in zip(pattern, layers, strict=True):
            expected = expected + torch.tanh(layer(expected)) if on else expected
        assert_close(f"flags {pattern}", h, expected, 1e-5)


@pytest.mark.parametrize("native_else", [None, False])
def test_branches_run_one_side(native_else):
    _, x = layers_and_input()
    nodes = ConditionalGraph(native_else=native_else)
    flags = torch.ones(4, dtype=torch.int32, device="cuda")
    graph = torch.cuda.CUDAGraph()
    y = torch.zeros(4, *x.shape, device="cuda")
    nodes.warm(lambda: y[0].copy_(x * 2.0))
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="relaxed"):
        conditions = nodes.conditions(4, either=True)
        conditions.set(flags)
        for i in range(4):
            run, otherwise = conditions.branches(i)
            with run:
                y[i].copy_(x * 2.0)
            with otherwise:
                y[i].copy_(x - 1.0)
    for pattern in PATTERNS:
        flags.copy_(torch.tensor(pattern))
        poison(y)
        graph.replay()
        for i, on in enumerate(pattern):
            assert_close(
                f"native {nodes.native_else}, flags {pattern}, node {i}", y[i], x * 2.0 if on else x - 1.0, 1e-6
            )


@pytest.mark.parametrize("rows", [1, 40, 700])
def test_the_probe_arms_later_nodes_itself(rows):
    weights, nodes = ProbeWeights.pack(Probe(256).cuda(), "cuda"), ConditionalGraph()
    hidden = torch.randn(rows, 256, device="cuda", dtype=torch.bfloat16)
    limit, y = torch.zeros(1, device="cuda"), torch.zeros(2, device="cuda")
    probe_risk(hidden, weights, threshold=limit, arm=nodes.none)
    nodes.warm(lambda: y[:1].add_(1.0))
    y.zero_()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="relaxed"):
        conditions = nodes.conditions(2)
        probe_risk(hidden, weights, threshold=limit, arm=conditions)
        for i in range(2):
            with conditions.body(i):
                y[i].add_(1.0)
    for value, total in ((-1.0, 1.0), (1e9, 1.0), (-1.0, 2.0)):
        limit.fill_(value)
        graph.replay()
        assert y.tolist() == [total, total], f"threshold {value}"


@pytest.mark.parametrize("rows", [1, 700])
def test_the_router_arms_its_node_itself(rows):
    weights, nodes = RouterWeights.pack(router_of(128), "cuda"), ConditionalGraph()
    hidden, limit, y = (
        torch.randn(rows, 128, device="cuda"),
        torch.zeros(1, device="cuda"),
        torch.zeros(1, device="cuda"),
    )
    router_score(hidden, weights, threshold=limit, arm=nodes.none)
    nodes.warm(lambda: y.add_(1.0))
    y.zero_()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="relaxed"):
        conditions = nodes.conditions(1)
        router_score(hidden, weights, threshold=limit, arm=conditions)
        with conditions.body(0):
            y.add_(1.0)
    for value, total in ((1e9, 1.0), (-1e9, 1.0), (1e9, 2.0)):
        limit.fill_(value)
        graph.replay()
        assert y.item() == total, f"threshold {value}"


def test_misuse_is_named():
    nodes = ConditionalGraph()
    with pytest.raises(RuntimeError, match="inside a CUDA graph"):
        nodes.conditions(1)
    weights, hidden = ProbeWeights.pack(Probe(64, 130).cuda(), "cuda"), torch.randn(3, 64, device="cuda")
    x = torch.zeros(8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    x.add_(1.0)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="before capturing"), torch.cuda.graph(graph):  # noqa: PT012
        x.add_(1.0)
        probe_risk(hidden, weights)
