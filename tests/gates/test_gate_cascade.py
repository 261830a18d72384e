"""The cascade by hand: the first checkpoint that fires is final, and what the max rule shares."""

from __future__ import annotations

import torch
from gate_helpers import Reads, by_hand

from sedac_cli.gates.cascade import CascadeGate


def states(*risks):
    """risks: (at layer 1, at layer 3) per token."""
    layers = [torch.zeros(len(risks), 1) for _ in range(5)]
    layers[1] = torch.tensor([[a] for a, _ in risks])
    layers[3] = torch.tensor([[b] for _, b in risks])
    return layers


def cascade(rule="token"):
    return CascadeGate(5, {1: Reads(), 3: Reads()}, {1: 1.0, 3: 2.0}, rule)


def test_the_first_checkpoint_that_fires_is_final():
    scales, exit_layer = by_hand(cascade(), states((0.5, 9.0), (1.0, 1.5), (9.0, 2.0)))
    assert scales.T.tolist() == [[1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert exit_layer.tolist() == [1, 3, 5]


def test_under_the_max_rule_a_position_exits_together():
    # two sequences of two positions; at position 0 the second sequence only agrees at layer 3
    risks = states((0.5, 9.0), (0.5, 9.0), (5.0, 1.0), (0.5, 9.0))
    _, exit_layer = by_hand(cascade("max"), risks, shape=(2, 2))
    assert exit_layer.tolist() == [5, 1, 5, 1]
    risks = states((0.5, 1.0), (0.5, 9.0), (5.0, 1.0), (0.5, 9.0))
    _, exit_layer = by_hand(cascade("max"), risks, shape=(2, 2))
    assert exit_layer.tolist() == [3, 1, 3, 1]


def test_under_the_max_rule_padding_has_no_say():
    risks = states((0.5, 9.0), (5.0, 5.0))
    real = torch.tensor([True, False])
    assert by_hand(cascade("max"), risks, shape=(2, 1), real=real)[1].tolist() == [1, 5]
