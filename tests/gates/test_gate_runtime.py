"""The same gate object by hand on collected states and in the eager runtime: one decision core, one answer."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model
from gate_helpers import by_hand, random_probe

from sedac_cli.gates.base import Guards
from sedac_cli.gates.cascade import CascadeGate, FixedGate
from sedac_cli.gates.entropy import EntropyGate
from sedac_cli.gates.lens import HeadLens
from sedac_cli.gates.soft import SoftGate
from sedac_cli.gates.stability import StabilityGate, cosine
from sedac_cli.runtime.skip import skipping
from sedac_cli.structure import find_decoder

L = 6
GUARDS = Guards(sinks=2, last=1)


class Transparent:
    """A stand-in that returns what the MLP would have: decisions are taken and nothing changes."""

    def __init__(self, decoder):
        self.branches = decoder.branches

    def rows(self, layer, x):
        mlp = self.branches[layer].entry
        return type(mlp).forward(mlp, x)

    def cost_per_token(self, layer):
        return 0.0


@pytest.fixture(scope="module")
def world():
    model = tiny_model(num_hidden_layers=L)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)  # a random model of the usual scale hardly moves its states
    ids = torch.randint(3, 97, (3, 14), generator=torch.Generator().manual_seed(2))
    states = model(ids, output_hidden_states=True).hidden_states[:L]
    return model, find_decoder(model), ids, [state.reshape(-1, 32) for state in states]


def between(values, share):
    """A threshold that splits the values, as far from all of them as can be."""
    ordered = values.sort().values
    index = int(share * len(ordered))
    return ((ordered[index - 1] + ordered[index]) / 2).item()


def gates(decoder, states, loose):
    """Every gate, splitting the tokens (`loose`) or skipping nothing."""
    probes = {layer: random_probe(32, layer) for layer in (1, 3)}
    limits = {layer: between(probe(states[layer]), 0.4) if loose else 0.0 for layer, probe in probes.items()}
    turns = torch.stack([cosine(states[layer], states[layer - 1]) for layer in range(1, L)])
    lens = HeadLens(decoder)
    entropy = {layer: lens(layer, states[layer]) for layer in (2, 4)}
    mean = {layer: bits.mean().item() for layer, bits in entropy.items()}
    sd = {layer: bits.std().item() for layer, bits in entropy.items()}
    return {
        "fixed": FixedGate(L, {3: probes[3]}, {3: limits[3]}, guards=GUARDS),
        "cascade": CascadeGate(L, probes, limits, guards=GUARDS),
        "max": CascadeGate(L, probes, {k: 3 * v for k, v in limits.items()}, "max", GUARDS),
        "soft": SoftGate(L, probes, {k: 4 * v for k, v in limits.items()}, floor=0.3, guards=GUARDS),
        "stability": StabilityGate(L, between(turns.flatten(), 0.3) if loose else 1.0, 2, 2, GUARDS),
        "entropy": EntropyGate(
            L, lens, mean, sd, 0.3 if loose else 2.0, anchor_interval=3, min_exit_layer=1, checks=[2, 4], guards=GUARDS
        ),
    }


NAMES = ["fixed", "cascade", "max", "soft", "stability", "entropy"]


@pytest.mark.parametrize("name", NAMES)
def test_simulation_and_runtime_decide_alike(world, name):
    model, decoder, ids, states = world
    gate = gates(decoder, states, loose=True)[name]
    position = torch.arange(14).repeat(3)
    scales, exit_layer = by_hand(gate, states, shape=(3, 14), position=position)
    with skipping(model, gate, Transparent(decoder), keep_passes=True) as run:
        model(ids)
    assert 0.03 < (scales == 0).float().mean() < 0.8
    assert run.skipped_per_layer == (scales == 0).sum(1).tolist()
    assert torch.equal(run.passes[0].exit_layer.flatten(), exit_layer)
    assert torch.equal(run.passes[0].skipped.flatten().long(), (scales == 0).sum(0))


@pytest.mark.parametrize("name", NAMES)
def test_a_gate_that_skips_nothing_changes_no_bit(world, name):
    model, decoder, ids, states = world
    stock = model(ids).logits
    with skipping(model, gates(decoder, states, loose=False)[name]) as run:
        assert torch.equal(model(ids).logits, stock)
    assert run.skip_ratio == 0


@pytest.mark.parametrize("name", ["cascade", "soft", "stability"])
def test_what_is_decided_to_be_skipped_is_skipped(world, name):
    """With the zero stand-in the output changes, and the rows that run are those not counted as skipped."""
    model, decoder, ids, states = world
    gate = gates(decoder, states, loose=True)[name]
    rows = [0] * L
    handles = [
        branch.entry.gate_proj.register_forward_hook(
            lambda m, a, o, layer=branch.layer: rows.__setitem__(layer, rows[layer] + a[0].shape[-2] * a[0].shape[0])
        )
        for branch in decoder.branches
    ]
    with skipping(model, gate) as run:
        logits = model(ids).logits
    for handle in handles:
        handle.remove()
    assert not torch.equal(logits, model(ids).logits)
    assert [42 - skipped for skipped in run.skipped_per_layer] == rows
