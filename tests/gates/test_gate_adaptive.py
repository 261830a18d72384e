"""Adaptive thresholds keep the exit rate they were asked for, whatever the inputs do and however they arrive."""

from __future__ import annotations

import math

import pytest
import torch
from gate_helpers import Reads, by_hand

from sedac_cli.errors import UsageError
from sedac_cli.gates.adaptive import AdaptiveThresholds
from sedac_cli.gates.base import Guards
from sedac_cli.gates.cascade import CascadeGate, FixedGate
from sedac_cli.gates.soft import SoftGate

WARM_UP = 50


def risks(total, seed=0):
    """Positive risks whose mean wanders by more than their spread, which itself doubles and more."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.arange(total) / total
    mean, sd = 2 + 2 * t + 0.5 * torch.sin(2 * math.pi * t), 0.5 + t
    return torch.nn.functional.softplus(mean + sd * torch.randn(total, generator=generator))


def stream(thresholds, values, size):
    """[tokens] bool: who exits, pass by pass."""
    exits = []
    for part in values.split(size):
        exits.append(part < thresholds.limits[0])
        thresholds.observe(0, part, torch.ones_like(part, dtype=torch.bool))
    return torch.cat(exits)


@pytest.mark.parametrize(("size", "total"), [(1, 2500), (8, 8000), (512, 24576)])
@pytest.mark.parametrize("rate", [0.2, 0.6, 0.9])
def test_the_target_is_held_within_two_points_under_drift(size, total, rate):
    exits = stream(AdaptiveThresholds({0: rate}, WARM_UP), risks(total), size)[max(WARM_UP, size) :].float()
    assert exits.mean().item() == pytest.approx(rate, abs=0.02)
    for quarter in exits.split(math.ceil(len(exits) / 4)):
        assert quarter.mean().item() == pytest.approx(rate, abs=0.06)


def test_after_a_jump_the_target_is_found_again():
    thresholds = AdaptiveThresholds({0: 0.6}, WARM_UP)
    stream(thresholds, risks(2000), 8)
    stream(thresholds, risks(2000, seed=1) * 10, 8)
    exits = stream(thresholds, risks(2000, seed=2) * 10, 8).float()
    assert exits.mean().item() == pytest.approx(0.6, abs=0.03)


@pytest.mark.parametrize("size", [1, 7, 512])
def test_nothing_exits_during_warm_up(size):
    thresholds = AdaptiveThresholds({0: 0.9}, calibration_steps=WARM_UP)
    exits = stream(thresholds, risks(1024), size)
    first = exits.nonzero()[0].item()
    assert first >= WARM_UP
    assert first < WARM_UP + 3 * size + 20


def test_rates_of_nothing_and_everything():
    values = risks(600)
    assert not stream(AdaptiveThresholds({0: 0.0}, WARM_UP), values, 8).any()
    assert stream(AdaptiveThresholds({0: 1.0}, WARM_UP), values, 8)[WARM_UP + 8 :].all()


def test_tokens_that_did_not_reach_the_checkpoint_teach_nothing():
    one, other = AdaptiveThresholds({0: 0.5}, 4, window=16), AdaptiveThresholds({0: 0.5}, 4, window=16)
    values = risks(300)
    for part in values.split(3):
        one.observe(0, part, torch.ones(3, dtype=torch.bool))
        mixed = torch.stack([torch.full((3,), 1e6), part, torch.full((3,), math.nan)], 1).flatten()
        reached = torch.tensor([False, True, True] * 3)
        other.observe(0, mixed, reached)
    assert torch.equal(one.limits, other.limits)
    before = one.limits.clone()
    one.observe(0, torch.rand(5), torch.zeros(5, dtype=torch.bool))
    one.observe(0, torch.empty(0), torch.empty(0, dtype=torch.bool))
    assert torch.equal(one.limits, before)


def test_checkpoints_learn_apart():
    thresholds = AdaptiveThresholds({7: 0.2, 3: 0.6}, 4)
    assert list(thresholds.rates.items()) == [(3, 0.6), (7, 0.2)]
    thresholds.observe(1, risks(100), torch.ones(100, dtype=torch.bool))
    assert thresholds.limits[0] == 0
    assert thresholds.limits[1] > 0


def test_every_tensor_is_taught_in_place():
    """What a captured CUDA graph needs: the addresses stay."""
    thresholds = AdaptiveThresholds({0: 0.5}, 1)
    addresses = {name: value.data_ptr() for name, value in vars(thresholds).items() if isinstance(value, torch.Tensor)}
    assert len(addresses) == 8
    stream(thresholds, risks(100), 10)
    for name, address in addresses.items():
        assert getattr(thresholds, name).data_ptr() == address


def test_reset_and_pause():
    thresholds = AdaptiveThresholds({0: 0.5}, 1)
    with thresholds.paused():
        stream(thresholds, risks(100), 10)
    assert thresholds.limits[0] == 0
    first = stream(thresholds, risks(100), 10)
    thresholds.reset()
    assert thresholds.limits[0] == 0
    assert torch.equal(stream(thresholds, risks(100), 10), first)


def test_a_pass_is_judged_before_it_is_learnt_from():
    """So that a token's fate never depends on those beside it."""
    values = risks(400)

    def exits_beside(companions):
        gate = FixedGate(2, {0: Reads()}, AdaptiveThresholds({0: 0.5}, WARM_UP))
        for part in values[:200].split(10):
            by_hand(gate, [part.unsqueeze(1)] * 2)
        return by_hand(gate, [torch.cat([values[200:210], companions]).unsqueeze(1)] * 2)[1][:10]

    assert torch.equal(exits_beside(torch.zeros(50)), exits_beside(torch.full((50,), 99.0)))
    assert 0 < exits_beside(torch.zeros(1)).sum() < 20


@pytest.mark.parametrize("kind", [CascadeGate, SoftGate])
def test_the_gate_keeps_its_thresholds_across_passes(kind):
    """Of those that reach each checkpoint, the asked share exits; a sink reaches none."""
    rates = {1: 0.3, 2: 0.5}
    gate = kind(4, {1: Reads(0), 2: Reads(1)}, AdaptiveThresholds(rates, WARM_UP), guards=Guards(sinks=2))
    early = risks(3000)  # the later risk resembles the earlier one: those that reach it are not as all tokens are
    values = torch.stack([early, early + 0.3 * risks(3000, seed=1)], 1)
    under = [[], []]
    for number, part in enumerate(values.split(10)):
        state = gate.start(10, "cpu")
        for layer in range(4):
            limit = gate.limits.clone()
            open_ = state.may_skip & ~state.memory.get("latched", torch.zeros(10, dtype=torch.bool))
            gate.decide(layer, part, state)
            if layer in rates and number > 10:
                under[layer - 1].append((part[:, layer - 1] < limit[layer - 1])[open_])
        assert (state.scale[:2] == 1).all()
    for seen, rate in zip(under, rates.values(), strict=True):
        assert torch.cat(seen).float().mean().item() == pytest.approx(rate, abs=0.02)


@pytest.mark.parametrize("wrong", [{"alpha": 0.0}, {"alpha": 1.5}, {"calibration_steps": 0}, {"window": 2}])
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(UsageError, match="out of range"):
        AdaptiveThresholds({0: 0.5}, **wrong)


def test_rates_out_of_range_or_for_other_layers_are_refused():
    with pytest.raises(UsageError, match=r"rates=1.2"):
        AdaptiveThresholds({0: 1.2})
    with pytest.raises(UsageError, match=r"probes for layers \[1\] but thresholds for layers \[2\]"):
        FixedGate(4, {1: Reads()}, AdaptiveThresholds({2: 0.5}))
