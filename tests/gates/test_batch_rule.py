"""Batch rule `max`: a step exits whole or not at all; padding has no say, tokens that have left have had theirs."""

from __future__ import annotations

import torch
from torch import nn

from sedac_cli.gates.base import Guards
from sedac_cli.gates.cascade import CascadeGate


class Reads(nn.Module):
    """The risk is the hidden state itself."""

    rank = 1

    def forward(self, hidden):
        return hidden.squeeze(-1)


def play(risks: dict[int, list[list[float]]], position, real=None, sinks=0) -> list[list[int]]:
    shape = torch.tensor(next(iter(risks.values()))).shape
    gate = CascadeGate(4, dict.fromkeys(risks, Reads()), dict.fromkeys(risks, 1.0), "max", Guards(sinks=sinks))
    real = None if real is None else torch.tensor(real).flatten().bool()
    state = gate.start(shape.numel(), "cpu", shape=tuple(shape), position=torch.tensor(position).flatten(), real=real)
    for layer in range(4):
        hidden = torch.tensor(risks[layer]).view(-1, 1) if layer in risks else None
        gate.decide(layer, hidden, state)
    return state.exit_layer.view(*shape).tolist()


def test_one_unwilling_token_keeps_its_step():
    exits = play({1: [[0.5, 0.5], [0.5, 2.0]], 2: [[2.0, 0.5], [2.0, 0.5]]}, [[5, 6], [5, 6]])
    assert exits == [[1, 2], [1, 2]]


def test_padding_has_no_say():
    exits = play({1: [[9.0, 0.5], [0.5, 0.5]]}, [[0, 0], [5, 6]], real=[[0, 1], [1, 1]])
    assert exits == [[4, 1], [1, 1]]


def test_a_token_that_may_not_skip_goes_on_voting_and_one_that_has_left_does_not():
    """Rows of unequal age, as left padding makes them: the second is at its sink, so it stays when the first leaves."""
    position = [[9], [0], [8]]
    assert play({1: [[0.5], [0.5], [0.5]], 2: [[2.0], [0.5], [2.0]]}, position, sinks=4) == [[1], [4], [1]]
    stays = {1: [[2.0], [0.5], [0.5]], 2: [[0.5], [2.0], [0.5]]}
    assert play(stays, position, sinks=4) == [[4], [4], [4]]  # the sink's low risk at layer 1 is no vote at layer 2


def test_who_has_left_need_not_agree_again():
    """The first row has left already and its risk means nothing any more."""
    gate = CascadeGate(4, {1: Reads(), 2: Reads()}, {1: 1.0, 2: 1.0}, "max")
    state = gate.start(2, "cpu", shape=(2, 1))
    state.memory["latched"][0] = True
    gate.decide(1, torch.tensor([[9.0], [0.5]]), state)
    assert state.memory["latched"].tolist() == [True, True]
