"""The eager runtime: what is skipped is not computed, and what is not skipped is not touched."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model
from torch import nn

from sedac_cli import skipping
from sedac_cli.gates.base import Guards
from sedac_cli.gates.simple import AlwaysGate, NeverGate, RandomGate
from sedac_cli.structure import find_decoder

FAMILIES = ["qwen2", "llama"]


def ids_for(model, batch=3, length=9, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.vocab_size, (batch, length), generator=generator)


@pytest.mark.parametrize("family", FAMILIES)
def test_never_is_bit_identical(family):
    model = tiny_model(family)
    ids = ids_for(model)
    stock = model(ids).logits
    stock_text = model.generate(ids, max_new_tokens=8, do_sample=False)
    with skipping(model, "never"):
        assert torch.equal(model(ids).logits, stock)
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), stock_text)


@pytest.mark.parametrize("family", FAMILIES)
def test_always_equals_a_model_whose_mlps_are_zero(family):
    model, zeroed = tiny_model(family), tiny_model(family)
    for branch in find_decoder(zeroed).branches[2:]:
        for parameter in branch.entry.parameters():
            nn.init.zeros_(parameter)
    ids = ids_for(model)
    with skipping(model, "always:2") as run:
        assert torch.equal(model(ids).logits, zeroed(ids).logits)
    assert run.skipped_per_layer == [0, 0, ids.numel(), ids.numel()]
    assert run.skip_ratio == 0.5


def test_skipped_rows_never_reach_the_mlp():
    model = tiny_model()
    decoder = find_decoder(model)
    rows = []
    decoder.branches[1].entry.gate_proj.register_forward_hook(lambda m, a, o: rows.append(a[0].shape[-2]))
    ids = ids_for(model, batch=4, length=50)
    with skipping(model, RandomGate(4, 0.5)) as run:
        model(ids)
    assert rows == [200 - run.skipped_per_layer[1]]
    assert 60 < rows[0] < 140
    with skipping(model, "always:0"):
        model(ids)
    assert len(rows) == 1


def test_the_model_is_left_as_it_was():
    model = tiny_model()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    ids = ids_for(model)
    stock = model(ids).logits
    with pytest.raises(ZeroDivisionError), skipping(model, "always:1"):
        raise ZeroDivisionError
    assert torch.equal(model(ids).logits, stock)
    for name, module in model.named_modules():
        assert "forward" not in module.__dict__
        assert set(module.__dict__) == set(before[name])
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


@pytest.mark.parametrize("gate", ["always:2", "never"])
def test_cached_decoding_agrees_with_the_uncached_pass(gate):
    model = tiny_model()
    ids = ids_for(model, batch=2, length=12)
    with skipping(model, gate):
        whole = model(ids).logits
        cache = model(ids[:, :5], use_cache=True)
        steps = [cache.logits]
        for t in range(5, 12):
            cache = model(ids[:, t : t + 1], past_key_values=cache.past_key_values, use_cache=True)
            steps.append(cache.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)


def test_left_padding_does_not_change_a_sequence_and_is_not_counted():
    model = tiny_model()
    ids = ids_for(model, batch=1, length=8)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 8, dtype=torch.long)], 1)
    gate = AlwaysGate(4, 1, Guards(sinks=4))
    with skipping(model, gate) as plain:
        expected = model(ids).logits
    with skipping(model, gate) as run:
        position = (mask.cumsum(1) - 1).clamp_min(0)
        got = model(padded, attention_mask=mask, position_ids=position).logits[:, 3:]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert run.tokens == plain.tokens == 8
    assert run.skipped_per_layer == plain.skipped_per_layer == [0, 4, 4, 4]


def test_guards_hold_for_sinks_layers_and_phase():
    model = tiny_model()
    ids = ids_for(model, batch=2, length=10)
    with skipping(model, AlwaysGate(4, 0, Guards(sinks=4, first=1, last=1)), keep_passes=True) as run:
        model(ids)
    assert run.skipped_per_layer == [0, 12, 12, 0]
    assert run.passes[0].skipped[:, :4].sum() == 0
    assert (run.passes[0].exit_layer[:, 4:] == 1).all()
    with skipping(model, AlwaysGate(4, 0, Guards(prefill=False)), keep_passes=True) as run:
        model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert run.passes[0].skipped.sum() == 0
    assert all((p.skipped == 4).all() for p in run.passes[1:])


def test_checkpoint_is_the_hidden_state_entering_the_layer():
    model = tiny_model()
    decoder = find_decoder(model)
    ids = ids_for(model)
    hidden = model(ids, output_hidden_states=True).hidden_states
    for layer in range(4):
        seen = []
        handle = decoder.at_checkpoint(layer, seen.append)
        model(ids)
        handle.remove()
        assert torch.equal(seen[0], hidden[layer])


def test_never_gate_reports_no_skips():
    model = tiny_model()
    with skipping(model, NeverGate(4)) as run:
        model(ids_for(model))
    assert run.tokens == 27
    assert run.skip_ratio == 0.0
