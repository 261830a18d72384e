"""A rule that is not asked where it has nothing new to say decides exactly as if it were asked at every layer."""

from __future__ import annotations

import pytest
import torch
from gate_helpers import ColumnLens, random_probe, random_states

from sedac_cli.gates.base import Guards
from sedac_cli.gates.cascade import CascadeGate, FixedGate
from sedac_cli.gates.entropy import EntropyGate
from sedac_cli.gates.learned import LearnedGate, Router
from sedac_cli.gates.simple import AlwaysGate, NeverGate, RandomGate
from sedac_cli.gates.soft import SoftGate
from sedac_cli.gates.stability import StabilityGate

LAYERS, TOKENS, WIDTH = 12, 40, 8
GUARDS = [Guards(), Guards(sinks=4, first=4, last=2), Guards(first=6)]


def router(seed):
    torch.manual_seed(seed)
    made = Router(WIDTH, 4).requires_grad_(False)
    made.weight.normal_()
    return made


def make(name, guards):
    probes = {layer: random_probe(WIDTH, layer) for layer in (3, 4, 8)}
    limits = dict.fromkeys(probes, 0.7)
    return {
        "never": lambda: NeverGate(LAYERS, guards),
        "always": lambda: AlwaysGate(LAYERS, 5, guards),
        "random": lambda: RandomGate(LAYERS, 0.4, 1, guards),
        "fixed": lambda: FixedGate(LAYERS, {3: probes[3]}, {3: 0.7}, guards=guards),
        "cascade": lambda: CascadeGate(LAYERS, probes, limits, guards=guards),
        "max": lambda: CascadeGate(LAYERS, probes, dict.fromkeys(probes, 1.2), "max", guards),
        "soft": lambda: SoftGate(LAYERS, probes, dict.fromkeys(probes, 1.5), floor=0.4, guards=guards),
        "stability": lambda: StabilityGate(LAYERS, 0.0, 2, 5, guards),
        "entropy": lambda: EntropyGate(
            LAYERS, ColumnLens(), 0.0, 1.0, 0.1, anchor_interval=4, min_exit_layer=1, checks=[3, 6, 9], guards=guards
        ),
        "learned": lambda: LearnedGate(LAYERS, {layer: router(layer) for layer in (2, 3, 7)}, 0.0, guards),
    }[name]()


def decisions(gate, states):
    state = gate.start(TOKENS, "cpu", shape=(4, 10), position=torch.arange(10).repeat(4))
    rows = []
    for layer, hidden in enumerate(states):
        gate.decide(layer, hidden, state)
        rows.append(state.scale.clone())
    return torch.stack(rows), state.exit_layer


NAMES = ["never", "always", "random", "fixed", "cascade", "max", "soft", "stability", "entropy", "learned"]


@pytest.mark.parametrize("guards", GUARDS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_not_asking_changes_nothing(name, guards, monkeypatch):
    states = random_states(LAYERS, TOKENS, WIDTH)
    gate, asked = make(name, guards), []
    rule = gate.rule
    monkeypatch.setattr(gate, "rule", lambda layer, *rest: asked.append(layer) or rule(layer, *rest))
    scales, exits = decisions(gate, states)
    everywhere = make(name, guards)
    monkeypatch.setattr(everywhere, "holds", lambda layer: False)
    expected, expected_exits = decisions(everywhere, states)
    assert torch.equal(scales, expected)
    assert torch.equal(exits, expected_exits)
    if name in ("random", "stability"):  # new coins; every layer is read
        assert len(asked) >= LAYERS - 3
    else:
        assert len(asked) < LAYERS - 1
    if name != "never":
        assert 0 < (scales == 0).float().mean() < 1
    assert torch.equal(exits.long(), torch.where(scales == 0, torch.arange(LAYERS).unsqueeze(1), LAYERS).amin(dim=0))


def test_a_layer_out_of_turn_is_decided_afresh():
    states = random_states(LAYERS, TOKENS, WIDTH)
    gate = make("always", Guards())
    state = gate.start(TOKENS, "cpu")
    gate.decide(0, states[0], state)
    gate.decide(7, states[7], state)
    assert (state.scale == 0).all()
