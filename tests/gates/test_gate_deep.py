"""Deep thinking changes what is computed, not only what is counted."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import tiny_model
from gate_helpers import random_probe

from sedac_cli.errors import UsageError
from sedac_cli.gates.adaptive import AdaptiveThresholds
from sedac_cli.gates.cascade import FixedGate
from sedac_cli.gates.deep import DeepThinking
from sedac_cli.gates.simple import AlwaysGate
from sedac_cli.gpu.reference import entropy_of_logits
from sedac_cli.runtime.deep import deep_forward
from sedac_cli.runtime.skip import skipping
from sedac_cli.structure import find_decoder

GATE = AlwaysGate(4, 1)


@pytest.fixture(scope="module")
def decoder():
    model = tiny_model()
    model.lm_head.weight.mul_(20)  # spread the entropies out
    return find_decoder(model)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(4))


def gated(decoder, ids, **inputs):
    with skipping(decoder.model, GATE) as run:
        logits = decoder.model(ids, **inputs).logits
    return logits, entropy_of_logits(logits.view(-1, 97))[0].view(ids.shape), run


def test_thinking_about_everything_is_the_dense_model_bit_for_bit(decoder, ids):
    result = deep_forward(decoder, GATE, ids, policy=DeepThinking(tau_high=0.0, max_rounds=3))
    assert torch.equal(result.logits, decoder.model(ids).logits)
    assert (result.rounds == 1).all()
    assert result.passes == 2
    assert not torch.equal(result.logits, gated(decoder, ids)[0])


def test_thinking_about_nothing_is_the_gated_model_bit_for_bit(decoder, ids):
    logits, _, _ = gated(decoder, ids)
    for policy in (DeepThinking(tau_high=1e9, max_rounds=3), DeepThinking(tau_high=0.0, max_rounds=0)):
        result = deep_forward(decoder, GATE, ids, policy=policy)
        assert torch.equal(result.logits, logits)
        assert result.rounds.sum() == 0
        assert result.passes == 1


def test_exactly_the_uncertain_tokens_are_run_again_and_their_answer_changes(decoder, ids):
    logits, entropy, _ = gated(decoder, ids)
    tau = entropy.median().item()
    result = deep_forward(decoder, GATE, ids, policy=DeepThinking(tau, max_rounds=1))
    uncertain = entropy > tau
    assert 0 < uncertain.sum() < ids.numel()
    assert torch.equal(result.rounds.bool(), uncertain)
    change = (result.logits - logits).abs().amax(-1)
    assert change[uncertain].min() > 1e-3
    certain_from_the_start = (uncertain.cumsum(1) == 0) & ~uncertain
    assert (change[certain_from_the_start] < 1e-5).all()
    # 3 of 4 MLPs of every token in the first pass, of the certain ones in the second
    assert sum(result.run.skipped_per_layer) == 3 * ids.numel() + 3 * (~uncertain).sum().item()


def test_a_second_round_gives_the_uncertain_token_a_dense_past(decoder, ids):
    entropy = gated(decoder, ids)[1]
    dense = decoder.model(ids).logits
    for tau in entropy.flatten().sort(descending=True).values[2:8].tolist():
        one = deep_forward(decoder, GATE, ids, policy=DeepThinking(tau, max_rounds=1))
        still = one.entropy > tau
        if not still.any():
            continue
        two = deep_forward(decoder, GATE, ids, policy=DeepThinking(tau, max_rounds=2))
        torch.testing.assert_close(two.logits[still], dense[still], rtol=1e-4, atol=1e-3)
        assert (two.rounds >= one.rounds).all()
        if two.passes == 3 and not torch.allclose(one.logits[still], dense[still], atol=1e-2):
            return
    pytest.fail("no threshold made a second round matter")


def test_the_policy_by_hand():
    policy = DeepThinking(tau_high=2.0, max_rounds=2)
    entropy = torch.tensor([[1.0, 3.0, 1.0, 3.0], [9.0, 1.0, 1.0, 1.0]])
    real = torch.tensor([[True] * 4, [False, True, True, True]])
    nobody = torch.zeros_like(real)
    assert policy.rerun(entropy, real, nobody, 1).int().tolist() == [[0, 1, 0, 1], [0, 0, 0, 0]]
    assert policy.rerun(entropy, real, nobody, 2).int().tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]
    forced = torch.tensor([[False] * 4, [False, False, True, False]])
    assert policy.rerun(entropy, real, forced, 1).int().tolist() == [[0, 1, 0, 1], [0, 0, 1, 0]]


def test_padding_is_never_thought_about(decoder, ids):
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    result = deep_forward(decoder, GATE, ids, mask, policy=DeepThinking(0.0))
    assert (result.rounds[0, :3] == 0).all()
    assert (result.rounds[mask.bool()] == 1).all()
    dense = decoder.model(ids, attention_mask=mask).logits
    torch.testing.assert_close(result.logits[mask.bool()], dense[mask.bool()], rtol=1e-4, atol=1e-4)


def test_a_decode_step_takes_its_cache_entries_back(decoder, ids):
    from transformers import DynamicCache

    def cache_of_the_prefix():
        cache = DynamicCache(config=decoder.model.config)
        decoder.model(ids[:, :-1], past_key_values=cache)
        return cache

    result = deep_forward(
        decoder, GATE, ids[:, -1:], policy=DeepThinking(0.0, max_rounds=3), cache=cache_of_the_prefix()
    )
    dense = decoder.model(ids[:, -1:], past_key_values=cache_of_the_prefix()).logits
    assert torch.equal(result.logits, dense)
    assert result.cache.get_seq_length() == ids.shape[1]
    assert result.rounds.tolist() == [[1], [1]]
    with pytest.raises(UsageError, match="cache"):
        deep_forward(decoder, GATE, ids, policy=DeepThinking(0.0), cache=object())


def test_adaptive_thresholds_count_each_token_once(decoder, ids):
    gate = FixedGate(4, {1: random_probe(32)}, AdaptiveThresholds({1: 0.5}, calibration_steps=1))
    tau = gated(decoder, ids)[1].median().item()
    assert deep_forward(decoder, gate, ids, policy=DeepThinking(tau)).passes == 2
    assert gate.adaptive._seen.tolist() == [ids.numel()]
    assert gate.adaptive.learning


@pytest.mark.parametrize("wrong", [{"tau_high": -1.0}, {"tau_high": math.nan}, {"max_rounds": -1}])
def test_nonsense_is_refused(wrong):
    with pytest.raises(UsageError):
        DeepThinking(**wrong)
