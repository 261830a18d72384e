"""A cascade that decides for the whole batch, in a captured step: rows of a prompt have no vote, and their MLPs run all the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mlps import LAYERS, WIDTH, make_layers, run_layers

from sedac_cli.gates.cascade import CascadeGate
from sedac_cli.gpu import decode_reference
from sedac_cli.probes import LREProbe
from sedac_cli.runtime.plan import Plan
from sedac_cli.standins import ZeroStandIn
from sedac_cli.vllm import captured, dense_mlp
from sedac_cli.vllm.device import DeviceSession
from sedac_cli.vllm.session import Session, StepRows
from sedac_cli.vllm.settings import read_settings

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def twins(monkeypatch):
    """Captured steps on a CPU: kernels by their twins, no nodes."""

    def gated(x, gate, up, activation, *, need, other=None, **order):
        return decode_reference.skinny_gated(x, gate, up, activation, need=need, other=other)

    def linear(x, weights, biases=None, *, need, other=None, settled=False, **more):
        return decode_reference.skinny_linear(x, weights, biases, need=need, other=other, **more)

    monkeypatch.setattr(captured, "ConditionalGraph", lambda device: None)
    monkeypatch.setattr(dense_mlp, "skinny_gated", gated)
    monkeypatch.setattr(dense_mlp, "skinny_linear", linear)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def gate_of(limit):
    torch.manual_seed(11)
    return CascadeGate(LAYERS, {1: LREProbe(WIDTH, 16).requires_grad_(False)}, {1: limit}, batch_rule="max")


def on_device(limit):
    layers = make_layers()
    settings = read_settings({"gate": "never", "mlp": "kernels"}, {})
    session = DeviceSession(settings, Plan(gate_of(limit), ZeroStandIn()), layers, CPU, 64)
    session.capture.whole = lambda: True
    return session, layers


def on_host(limit):
    layers = make_layers()
    session = Session(read_settings({"gate": "never"}, {}), Plan(gate_of(limit), ZeroStandIn()), layers, CPU, 64)
    session.forward = {layer: layers[layer].mlp.forward for layer in session.gated}
    return session, layers


def run(made, x, step):
    session, layers = made
    session.begin(step)
    with torch.no_grad():
        out = run_layers(session, layers, x)
    session.end()
    return out


def step_of(prefill, dense=None):
    positions = np.arange(len(prefill), dtype=np.int32) + 20
    return StepRows(positions, np.array(prefill, dtype=bool), None if dense is None else np.array(dense, dtype=bool))


@pytest.mark.parametrize(
    ("prefill", "limit", "dense"),
    [([1] * 5, 0.0, None), ([1] * 5, 1e9, [1] * 5), ([0, 0, 1, 1, 1], 1e9, None), ([0, 0, 1, 1, 1], 0.0, None)],
    ids=["nobody may leave", "opted out", "beside rows that leave", "beside rows that stay"],
)
def test_a_prompt_keeps_its_mlps(prefill, limit, dense):
    torch.manual_seed(0)
    x, rows = torch.randn(5, WIDTH).bfloat16(), torch.tensor(prefill, dtype=torch.bool)
    found = run(on_device(limit), x, step_of(prefill, dense))
    expected = run(on_host(limit), x, step_of(prefill, dense))
    assert float((found[rows] - expected[rows]).float().norm() / expected[rows].float().norm()) < 0.02


def test_padding_asks_for_nothing():
    made = on_device(1e9)
    run(made, torch.randn(8, WIDTH).bfloat16(), step_of([0, 0, 0]))
    assert made[0].capture.flags.tolist() == [0] * len(made[0].gated)
