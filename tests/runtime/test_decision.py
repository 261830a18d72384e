"""A decision is kept while the gate holds to it, and not a layer longer."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model

from sedac_cli import skipping
from sedac_cli.gates.base import Gate, Guards
from sedac_cli.gates.cascade import CascadeGate
from sedac_cli.gates.learned import LearnedGate, Router
from sedac_cli.gates.simple import AlwaysGate, RandomGate
from sedac_cli.gates.soft import SoftGate
from sedac_cli.gates.stability import StabilityGate
from sedac_cli.probes import LREProbe
from sedac_cli.runtime.decision import Decision
from sedac_cli.standins import ZeroStandIn
from sedac_cli.standins.lowrank import LowRank, LowRankStandIns

LAYERS, WIDTH = 6, 32


def probes():
    torch.manual_seed(3)
    return {layer: LREProbe(WIDTH, 8).requires_grad_(False) for layer in (1, 4)}


def routers():
    torch.manual_seed(4)
    found = {layer: Router(WIDTH, 4).requires_grad_(False) for layer in (1, 2, 4)}
    for router in found.values():
        torch.nn.init.normal_(router.weight)
    return found


GATES = {
    "always": (lambda: AlwaysGate(LAYERS, 3), 2),
    "guarded": (lambda: AlwaysGate(LAYERS, 0, Guards(sinks=2, first=2, last=1)), 3),
    "cascade": (lambda: CascadeGate(LAYERS, probes(), {1: 0.7, 4: 0.7}), 3),
    "soft": (lambda: SoftGate(LAYERS, probes(), {1: 0.7, 4: 0.7}), 3),
    "stability": (lambda: StabilityGate(LAYERS, tau=0.9, k=1, min_layer=2), None),
    "random": (lambda: RandomGate(LAYERS, 0.5), LAYERS),
    "learned": (lambda: LearnedGate(LAYERS, routers(), 0.0), None),
}


def standins():
    torch.manual_seed(5)
    found = LowRankStandIns({layer: LowRank(WIDTH, 4) for layer in range(LAYERS)})
    for module in found.by_layer.values():
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter.requires_grad_(False), 0, 0.3)
    return found


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("standin", [ZeroStandIn, standins])
def test_kept_or_found_anew_is_the_same(name, standin, monkeypatch):
    make, wanted = GATES[name]
    model = tiny_model(num_hidden_layers=LAYERS)
    ids = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(1))
    found = []
    original = Decision.__init__

    def counted(self, scale, layer):
        found.append(layer)
        original(self, scale, layer)

    monkeypatch.setattr(Decision, "__init__", counted)
    with skipping(model, make(), standin()) as kept:
        logits = model(ids).logits
    times = len(found)
    assert wanted is None or times == wanted
    monkeypatch.setattr(Decision, "of", lambda state, layer, last: Decision(state.scale, layer))
    with skipping(model, make(), standin()) as anew:
        assert torch.equal(model(ids).logits, logits)
    assert len(found) - times == LAYERS
    assert kept.skipped_per_layer == anew.skipped_per_layer
    assert not torch.equal(model(ids).logits, logits)


class Flips(Gate):
    """Decides for itself, and tells nobody whether it held."""

    def decide(self, layer, hidden, state):
        state.scale.fill_(float(layer % 2))


def test_a_gate_that_does_not_say_whether_it_held_is_asked_in_every_layer():
    model = tiny_model(num_hidden_layers=LAYERS)
    with skipping(model, Flips(LAYERS)) as run:
        model(torch.tensor([[5, 6, 7]]))
    assert run.skipped_per_layer == [3, 0, 3, 0, 3, 0]


def test_rows_and_shares():
    state = Gate(2).start(5, "cpu")
    state.scale.copy_(torch.tensor([1.0, 0.0, 0.25, 1.0, 0.0]))
    decision = Decision.of(state, 0, None)
    assert (decision.rows.tolist(), decision.away.tolist()) == ([0, 2, 3], [1, 2, 4])
    assert not decision.everyone
    x = torch.ones(5, 2)
    mixed = decision.blend(ZeroStandIn(), 0, x, 8 * x[decision.rows])
    assert mixed[:, 0].tolist() == [8.0, 0.0, 2.0, 8.0, 0.0]
    added = decision.blend(ZeroStandIn(), 0, x, 8 * x[decision.rows], residual=x)
    assert added[:, 0].tolist() == [8.0, 1.0, 0.25 * 8 + 0.75, 8.0, 1.0]
    assert Decision(torch.ones(3), 0).everyone
    assert Decision(torch.zeros(3), 0).blend(ZeroStandIn(), 0, x[:3], None).abs().sum() == 0
