"""The eager runtime: what is skipped is not computed, and what is not skipped is not touched."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model
from torch import nn

from sedac_cli import skipping
from sedac_cli.errors import UsageError
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


def test_a_second_gate_is_refused_and_the_first_stays_in_force():
    model = tiny_model()
    ids = ids_for(model)
    with skipping(model, "always:2") as run:
        before = model(ids).logits
        with pytest.raises(UsageError, match="already in force"), skipping(model, "always:0"):
            pass
        assert torch.equal(model(ids).logits, before)
    assert run.skip_ratio == 0.5
    with skipping(model, "always:0") as run:
        model(ids)
    assert run.skip_ratio == 1.0


def test_a_gate_may_be_used_again_and_two_models_at_once():
    one, two = tiny_model(), tiny_model("llama")
    gate = AlwaysGate(4, 1)
    with skipping(one, gate) as first, skipping(two, gate) as second:
        one(ids_for(one))
        two(ids_for(two))
    assert first.skip_ratio == second.skip_ratio == 0.75


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_every_autograd_mode(mode):
    model = tiny_model()
    ids = ids_for(model)
    with skipping(model, "always:1"):
        expected = model(ids).logits
    with skipping(model, "always:1") as run:
        with mode():
            assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model(ids).logits, expected)
    with mode(), skipping(model, "always:1") as inside:
        assert torch.equal(model(ids).logits, expected)
    assert run.tokens == 2 * inside.tokens


def test_gradients_reach_the_rows_that_ran():
    model = tiny_model().requires_grad_(True)
    with skipping(model, RandomGate(4, 0.5)):
        model(ids_for(model)).logits.sum().backward()
    assert model.model.layers[0].mlp.down_proj.weight.grad.abs().sum() > 0
    assert torch.isfinite(model.model.embed_tokens.weight.grad).all()


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "opt", "bloom"])
def test_offloaded_weights(family):
    """accelerate keeps weights away and brings them in for each call; a skipped MLP's are not brought in."""
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model(family)
    ids = ids_for(model)
    stock = model(ids).logits
    with skipping(model, "always:2"):
        expected = model(ids).logits
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    decoder = find_decoder(model)
    assert decoder.device == torch.device("cpu")
    assert all(p.is_meta for p in decoder.branches[3].entry.parameters())
    decoder.check_head()
    with skipping(model, "always:2") as run:
        assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model.generate(ids, max_new_tokens=3)[:, :9], ids)
    assert run.skip_ratio == 0.5
    assert torch.equal(model(ids).logits, stock)


@pytest.mark.parametrize("family", ["qwen2", "bloom"])
def test_dispatched_model(family):
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model(family)
    ids = ids_for(model)
    with skipping(model, "always:2"):
        expected = model(ids).logits
    names = [name for name, _ in model.named_children()]
    accelerate.dispatch_model(model, dict.fromkeys(names, "cpu"), main_device="cpu", force_hooks=True)
    with skipping(model, "always:2"):
        assert torch.equal(model(ids).logits, expected)


class Blend(AlwaysGate):
    """Every row at the same scale."""

    def __init__(self, scale: float):
        super().__init__(4, 0)
        self.scale = scale

    def rule(self, layer, hidden, state):
        return torch.full_like(state.scale, self.scale)


class Halver:
    def rows(self, layer, x):
        return x / 2

    def cost_per_token(self, layer):
        return 0.0


class Same(Halver):
    def rows(self, layer, x):
        return x


@pytest.mark.parametrize("family", ["qwen2", "opt", "bloom", "mpt", "gpt_oss"])
@pytest.mark.parametrize("scale", [0.0, 0.25])
def test_standin_and_blend_in_every_kind_of_mlp(family, scale):
    """scale * MLP + (1 - scale) * stand-in, whether or not the MLP adds the residual itself."""
    model = tiny_model(family)
    ids = ids_for(model)
    with skipping(model, Blend(scale), Halver()):
        got = model(ids).logits
    inputs, handles = {}, []

    def keep(branch):
        def hook(module, args, kwargs):
            inputs[branch.layer] = args[0]

        return hook

    def mix(branch):
        def hook(module, args, kwargs, output):
            rows, *others = output if isinstance(output, tuple) else (output,)
            residual = kwargs.get("residual", args[-1]) if branch.adds_residual else 0.0
            x = inputs[branch.layer].view(rows.shape)
            rows = residual + scale * (rows - residual) + (1 - scale) * x / 2
            return (rows, *others) if others else rows

        return hook

    for branch in find_decoder(model).branches:
        handles.append(branch.entry.register_forward_pre_hook(keep(branch), with_kwargs=True))
        handles.append(branch.exit.register_forward_hook(mix(branch), with_kwargs=True))
    expected = model(ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_standin_that_returns_its_input_does_not_overwrite_it():
    model = tiny_model()
    ids = ids_for(model)
    seen = []
    find_decoder(model).branches[0].entry.register_forward_pre_hook(lambda m, args: seen.append((args[0], args[0] + 0)))
    with skipping(model, RandomGate(4, 0.5), Same()):
        model(ids)
    assert torch.equal(*seen[0])


def test_an_mlp_that_returns_more_than_rows_can_be_skipped_whole_at_once():
    """gpt-oss returns its router scores too: the layer unpacks two values even when no row ran."""
    model = tiny_model("gpt_oss", num_local_experts=4, num_experts_per_tok=2, head_dim=8)
    with skipping(model, "always:0") as run:
        model(ids_for(model))
    assert run.skip_ratio == 1.0


def test_a_pass_that_fails_is_not_counted():
    model = tiny_model()
    ids = ids_for(model)
    handle = model.model.layers[3].register_forward_hook(lambda *_: 1 / 0)
    with skipping(model, "always:0") as run:
        with pytest.raises(ZeroDivisionError):
            model(ids)
        handle.remove()
        model(ids)
    assert run.tokens == ids.numel()
    assert run.skip_ratio == 1.0


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "cohere2"])
def test_static_cache_and_chunked_prefill_keep_positions(family):
    """The mask of a static cache is longer than what was seen; chunks must not make new sinks."""
    from transformers import StaticCache

    model = tiny_model(family, head_dim=8)
    ids = ids_for(model, batch=2, length=12)
    ids[0, :3] = 0
    mask = (ids != 0).long()
    gate = AlwaysGate(4, 1, Guards(sinks=2))
    with skipping(model, gate, keep_passes=True) as run:
        whole = model(ids, attention_mask=mask).logits
        for cache in (None, StaticCache(config=model.config, max_cache_len=16)):
            out = model(ids[:, :5], attention_mask=mask[:, :5], past_key_values=cache, use_cache=True)
            steps, past = [out.logits], out.past_key_values
            for start in (5, 9):
                stop = min(start + 4, 12)
                out = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=past, use_cache=True)
                steps.append(out.logits)
            real = mask.bool()
            torch.testing.assert_close(torch.cat(steps, 1)[real], whole[real], rtol=1e-3, atol=1e-4)
    skipped = run.passes[0].skipped
    assert skipped[0].tolist() == [0] * 5 + [3] * 7
    assert skipped[1].tolist() == [0] * 2 + [3] * 10
    for passes in (run.passes[1:4], run.passes[4:7]):
        assert torch.equal(torch.cat([p.skipped for p in passes], 1), skipped)


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
def test_generate_counts_the_same_with_any_cache(family):
    model = tiny_model(family, head_dim=8)
    ids = ids_for(model, batch=2, length=7)
    ids[0, :3] = 0
    options = {"attention_mask": (ids != 0).long(), "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    counts, texts = [], []
    for cache in ("dynamic", "static"):
        with skipping(model, AlwaysGate(4, 1, Guards(sinks=2))) as run:
            texts.append(model.generate(ids, cache_implementation=cache, disable_compile=True, **options))
        counts.append((run.tokens, run.skipped_per_layer))
    assert counts[0] == counts[1] == (11 + 6, [0, 13, 13, 13])
    assert torch.equal(*texts)
