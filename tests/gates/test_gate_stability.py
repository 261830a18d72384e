"""The stability gate: runs of steady layers, counted per token."""

from __future__ import annotations

import math

import pytest
import torch
from gate_helpers import by_hand

from sedac_cli.errors import UsageError
from sedac_cli.gates.stability import StabilityGate, cosine


def turning(*angles_per_token):
    """States that turn by the given angle (degrees) at each layer from the second on."""
    layers = 1 + len(angles_per_token[0])
    totals = [[0.0] for _ in angles_per_token]
    for total, angles in zip(totals, angles_per_token, strict=True):
        for angle in angles:
            total.append(total[-1] + math.radians(angle))
    return [
        torch.tensor([[math.cos(t[layer]) * (layer + 1), math.sin(t[layer]) * (layer + 1)] for t in totals])
        for layer in range(layers)
    ]


# cos 10 = .985, cos 30 = .866
CALM, TURN = 10, 30


def test_k_steady_layers_in_a_row_latch():
    states = turning(
        [CALM, CALM, CALM, TURN, TURN, TURN],
        [CALM, TURN, CALM, CALM, TURN, CALM],
        [TURN, TURN, CALM, CALM, CALM, TURN],
    )
    scales, exit_layer = by_hand(StabilityGate(7, tau=0.95, k=2, min_layer=1), states)
    assert scales.T.tolist() == [[1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0]]
    assert exit_layer.tolist() == [2, 4, 4]
    scales, exit_layer = by_hand(StabilityGate(7, tau=0.95, k=3, min_layer=1), states)
    assert exit_layer.tolist() == [3, 7, 5]


@pytest.mark.parametrize("k", [1, 2, 3, 6])
@pytest.mark.parametrize("min_layer", [1, 3, 6])
def test_reading_only_what_matters_changes_nothing(k, min_layer):
    torch.manual_seed(k * 10 + min_layer)
    states = turning(*[[CALM if x else TURN for x in torch.rand(6) < 0.7] for _ in range(40)])
    thrifty = StabilityGate(7, tau=0.95, k=k, min_layer=min_layer)
    greedy = StabilityGate(7, tau=0.95, k=k, min_layer=min_layer)
    greedy.reads = lambda layer: True
    assert torch.equal(by_hand(thrifty, states)[1], by_hand(greedy, states)[1])
    assert by_hand(thrifty, states)[1].min() >= min_layer


def test_each_token_stands_for_itself():
    states = turning([CALM] * 6, [TURN] * 6)
    assert by_hand(StabilityGate(7, tau=0.95, k=3, min_layer=1), states)[1].tolist() == [3, 7]


def test_the_previous_state_is_kept_even_if_the_runtime_overwrites_it():
    states = turning([TURN] * 6)
    gate = StabilityGate(7, tau=0.95, k=1, min_layer=1)
    state = gate.start(1, "cpu")
    buffer = states[0].clone()
    for layer in range(7):
        buffer.copy_(states[layer])
        gate.decide(layer, buffer, state)
    assert state.exit_layer.item() == 7


def test_cosine_stays_in_range_and_survives_zero():
    rows = torch.randn(200, 7)
    assert cosine(rows, rows * 3).max() <= 1.0
    assert cosine(torch.zeros(1, 3), torch.ones(1, 3)).item() == 0.0
    scales, _ = by_hand(StabilityGate(4, tau=1.0, k=1, min_layer=1), [rows] * 4)
    assert (scales == 1).all()


@pytest.mark.parametrize("wrong", [{"tau": 1.5}, {"k": 0}, {"min_layer": 0}, {"min_layer": 9}, {"tau": math.nan}])
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(UsageError):
        StabilityGate(7, **wrong)
