"""What holds for every gate, whatever the states: monotone, token by token, guarded, and sane at the extremes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from gate_helpers import ColumnLens, Reads, by_hand, random_probe, random_states
from hypothesis import given, settings
from hypothesis import strategies as st

from sedac_cli.gates.adaptive import AdaptiveThresholds
from sedac_cli.gates.base import Guards
from sedac_cli.gates.cascade import CascadeGate, FixedGate
from sedac_cli.gates.entropy import EntropyGate
from sedac_cli.gates.lens import ProbeLens
from sedac_cli.gates.soft import SoftGate
from sedac_cli.gates.stability import StabilityGate

L, H = 8, 4
OPEN = Guards()

# name -> (gate for a looseness in [0, 1], the strictest looseness, the loosest)
MAKERS = {
    "fixed": lambda x, g: FixedGate(L, {2: Reads()}, {2: tan(x)}, guards=g),
    "cascade": lambda x, g: CascadeGate(L, {1: Reads(), 4: Reads(1)}, {1: tan(x) / 2, 4: tan(x)}, guards=g),
    "max": lambda x, g: CascadeGate(L, {1: Reads(), 4: Reads(1)}, {1: tan(x) / 2, 4: tan(x)}, "max", g),
    "soft": lambda x, g: SoftGate(L, {1: Reads(), 3: Reads(1), 5: Reads(2)}, dict.fromkeys((1, 3, 5), tan(x)), guards=g),
    "stability": lambda x, g: StabilityGate(L, tau=1 - 2 * x, k=2, min_layer=2, guards=g),
    "entropy": lambda x, g: EntropyGate(
        L, ColumnLens(), 0.5, 1.0, threshold=2 - 3 * x, anchor_interval=4, min_exit_layer=1, checks=[1, 5], guards=g
    ),
}  # fmt: skip
TOKENWISE = [name for name in MAKERS if name != "max"]
CASES = settings(max_examples=25, deadline=None, derandomize=True)

seeds = st.integers(0, 10_000)
counts = st.integers(1, 9)
loose = st.floats(0, 1)


def tan(x):
    """[0, 1] -> [0, inf]: every threshold there is."""
    return math.inf if x == 1 else math.tan(x * math.pi / 2)


def states_of(seed, tokens):
    return [state.abs() for state in random_states(L, tokens, H, seed)]


@pytest.mark.parametrize("name", MAKERS)
@CASES
@given(seed=seeds, tokens=counts, one=loose, other=loose)
def test_a_looser_threshold_never_runs_more(name, seed, tokens, one, other):
    strict, relaxed = sorted((one, other))
    states = states_of(seed, tokens)
    less, _ = by_hand(MAKERS[name](strict, OPEN), states)
    more, _ = by_hand(MAKERS[name](relaxed, OPEN), states)
    assert (more <= less + 1e-6).all()
    assert ((more >= 0) & (more <= 1)).all()


@pytest.mark.parametrize("name", TOKENWISE)
@CASES
@given(seed=seeds, tokens=st.integers(2, 9), x=loose, data=st.data())
def test_a_token_does_not_depend_on_its_neighbours(name, seed, tokens, x, data):
    gate, states = MAKERS[name](x, OPEN), states_of(seed, tokens)
    chosen = data.draw(st.permutations(range(tokens)))[: data.draw(st.integers(1, tokens))]
    everyone, exit_layer = by_hand(gate, states)
    few, few_exit = by_hand(gate, [state[chosen] for state in states])
    torch.testing.assert_close(few, everyone[:, chosen])
    assert torch.equal(few_exit, exit_layer[chosen])


def test_under_the_max_rule_it_does():
    states = [torch.tensor([[0.1] * H, [9.0] * H])] * L
    alone, _ = by_hand(MAKERS["max"](0.5, OPEN), [state[:1] for state in states])
    together, _ = by_hand(MAKERS["max"](0.5, OPEN), states, shape=(2, 1))
    assert alone[:, 0].sum() < together[:, 0].sum() == L


@pytest.mark.parametrize("name", MAKERS)
@CASES
@given(
    seed=seeds, tokens=counts, x=loose, sinks=st.integers(0, 4), first=st.integers(0, 3), last=st.integers(0, 3),
    data=st.data(),
)  # fmt: skip
def test_guards_padding_and_force_are_never_overridden(name, seed, tokens, x, sinks, first, last, data):
    mask = st.lists(st.booleans(), min_size=tokens, max_size=tokens).map(torch.tensor)
    real, force = data.draw(mask), data.draw(mask)
    gate = MAKERS[name](x, Guards(sinks=sinks, first=first, last=last))
    scales, exit_layer = by_hand(gate, states_of(seed, tokens), real=real, force=force)
    assert (scales[:, :sinks] == 1).all()
    assert (scales[:first] == 1).all()
    assert (scales[L - last :] == 1).all()
    assert (scales[:, ~real | force] == 1).all()
    assert (exit_layer[~real | force] == L).all()
    skipped = scales == 0
    expected = torch.where(skipped.any(0), skipped.int().argmax(0), L)
    assert torch.equal(exit_layer.long(), expected)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_phase_that_is_closed_skips_nothing(name, phase):
    gate = MAKERS[name](1.0, Guards(**{phase: False}))
    states = states_of(0, 5)
    assert (by_hand(gate, states, prefill=phase == "prefill")[0] == 1).all()
    assert (by_hand(gate, states, prefill=phase != "prefill")[0] == 0).any()


# the first layer that the loosest setting skips, and which layers run all the same
LOOSEST = {
    "fixed": (2, []),
    "cascade": (1, []),
    "max": (1, []),
    "soft": (1, []),
    "stability": (2, []),
    "entropy": (1, [4]),
}


@pytest.mark.parametrize("name", MAKERS)
@CASES
@given(seed=seeds, tokens=counts)
def test_the_extremes_are_never_and_always(name, seed, tokens):
    states = states_of(seed, tokens)
    assert (by_hand(MAKERS[name](0.0, OPEN), states)[0] == 1).all()
    begins, anchors = LOOSEST[name]
    expected = torch.zeros(L, tokens)
    expected[:begins] = 1
    expected[anchors] = 1
    assert torch.equal(by_hand(MAKERS[name](1.0, OPEN), states)[0], expected)


@pytest.mark.parametrize("name", MAKERS)
@CASES
@given(seed=seeds, tokens=counts, x=loose)
def test_a_pass_leaves_nothing_behind(name, seed, tokens, x):
    gate, states = MAKERS[name](x, OPEN), states_of(seed, tokens)
    first = by_hand(gate, states)[0]
    by_hand(gate, states_of(seed + 1, 3))
    assert torch.equal(by_hand(gate, states)[0], first)


PROBES = {1: random_probe(H), 5: random_probe(H, 1)}
VALUELESS = {
    "cascade": lambda: CascadeGate(L, PROBES, {1: 0.5, 5: 1.0}, guards=Guards(sinks=1)),
    "max": lambda: CascadeGate(L, PROBES, {1: 0.5, 5: 1.0}, "max"),
    "adaptive": lambda: CascadeGate(L, PROBES, AdaptiveThresholds({1: 0.2, 5: 0.6})),
    "soft": lambda: SoftGate(L, PROBES, AdaptiveThresholds({1: 0.2, 5: 0.6})),
    "stability": lambda: StabilityGate(L, min_layer=2),
    "entropy": lambda: EntropyGate(L, ProbeLens(PROBES), 3.0, 1.0, min_exit_layer=1, checks=[1, 5]),
}


@pytest.mark.parametrize("name", VALUELESS)
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_no_value_is_ever_read_by_the_host(name, tokens):
    """Meta tensors have shapes and no values: reading one, or branching on one, raises."""
    gate = copy.deepcopy(VALUELESS[name]()).to("meta")
    state = gate.start(tokens, "meta", position=torch.empty(tokens, device="meta"))
    for layer in range(L):
        gate.decide(layer, torch.empty(tokens, H, device="meta"), state)
    assert state.scale.shape == (tokens,)
