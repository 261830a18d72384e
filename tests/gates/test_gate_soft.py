"""The soft gate against its formula worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from gate_helpers import Reads, by_hand

from sedac_cli.errors import UsageError
from sedac_cli.gates.soft import SoftGate, soft_scale


def gate(**more):
    return SoftGate(6, {1: Reads(), 3: Reads()}, {1: 2.0, 3: 4.0}, **({"decay": 0.5, "floor": 0.0} | more))


def states(*risks):
    """risks: (at layer 1, at layer 3) per token."""
    layers = [torch.zeros(len(risks), 1) for _ in range(6)]
    layers[1] = torch.tensor([[a] for a, _ in risks])
    layers[3] = torch.tensor([[b] for _, b in risks])
    return layers


def expected(total):
    return 1 - (math.tanh(2 * total - 1) + math.tanh(1)) / (2 * math.tanh(1))


def test_confidence_accumulates_as_written():
    # conf at layer 1: 0.75, 0, 1; at layer 3: 0.5, 0.25, 0. C: .75 -> .375 + .5, 0 -> .25, 1 -> .5
    scales, exit_layer = by_hand(gate(), states((0.5, 2.0), (9.0, 3.0), (0.0, 4.0)))
    rows = [[1.0] * 3] * 1 + [[expected(0.75), 1.0, 0.0]] * 2 + [[expected(0.875), expected(0.25), 0.5]] * 3
    torch.testing.assert_close(scales, torch.tensor(rows), rtol=1e-5, atol=1e-6)
    assert exit_layer.tolist() == [6, 6, 1]


def test_weights_and_decay_enter_the_sum():
    scales, _ = by_hand(gate(decay=0.2, weights=[0.5, 0.8]), states((0.5, 2.0)))
    assert scales[2, 0].item() == pytest.approx(expected(0.375), abs=1e-6)
    assert scales[5, 0].item() == pytest.approx(expected(0.2 * 0.375 + 0.8 * 0.5), abs=1e-6)


def test_the_floor_makes_a_small_scale_a_skip():
    scales, exit_layer = by_hand(gate(floor=0.2), states((0.5, 2.0), (1.0, 4.0)))
    assert 0.19 < expected(0.75) < 0.2
    assert scales[:, 0].tolist() == [1, 0, 0, 0, 0, 0]
    assert (scales[:, 1] == 0).sum() == 0
    assert exit_layer.tolist() == [1, 6]


def test_no_confidence_leaves_the_mlp_exactly_alone_and_full_confidence_exactly_out():
    total = torch.tensor([0.0, 1e-9, 0.5, 1.0, 3.0])
    scale = soft_scale(total)
    assert scale[0] == 1.0
    assert scale[2] == pytest.approx(0.5)
    assert scale[3:].tolist() == [0.0, 0.0]
    assert ((scale >= 0) & (scale <= 1)).all()


def test_a_threshold_of_zero_divides_nothing_and_fires_nothing():
    zero = SoftGate(6, {1: Reads(), 3: Reads()}, {1: 0.0, 3: 0.0})
    scales, _ = by_hand(zero, states((0.0, 0.0), (1.0, 2.0)))
    assert (scales == 1).all()


def test_an_infinite_threshold_is_full_confidence():
    scales, _ = by_hand(SoftGate(6, {1: Reads()}, {1: math.inf}), states((5.0, 0.0)))
    assert scales[:, 0].tolist() == [1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"decay": 1.5}, "decay=1.5 is out of range"),
        ({"floor": -0.1}, "floor"),
        ({"weights": [1.0]}, "1 weights for 2"),
    ],
)
def test_options_out_of_range_are_refused(wrong, message):
    with pytest.raises(UsageError, match=message):
        gate(**wrong)
