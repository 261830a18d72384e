"""Any decoder-only architecture: for each family (`families.py`), the promises of the runtime on a tiny random model."""

from __future__ import annotations

import contextlib
import inspect

import pytest
import torch
from families import CACHE_SHOWS, CURVED_HEAD, FAMILIES, NO_CACHE, PADDING_SHOWS, REFUSED, STREAMS, build

from sedac_cli import skipping
from sedac_cli.errors import InputError
from sedac_cli.gates.base import Gate, Guards
from sedac_cli.gates.simple import AlwaysGate, RandomGate
from sedac_cli.structure import Decoder, find_decoder


def ids_for(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits_of(model, ids, **kwargs):
    return model(input_ids=ids, use_cache=False, **kwargs).logits


@contextlib.contextmanager
def masked(decoder: Decoder, gate: Gate, shape: tuple[int, int], **where: torch.Tensor):
    """The reference: every MLP runs on every row, then the rows that skip are set to zero (or to their residual)."""
    handles, state = [], gate.start(shape[0] * shape[1], "cpu", shape=shape, **where)

    def cut(branch):
        def hook(module, args, kwargs, output):
            gate.decide(branch.layer, None, state)
            rows, *others = output if isinstance(output, tuple) else (output,)
            instead = kwargs.get("residual", args[-1]) if branch.adds_residual else torch.zeros_like(rows)
            keep = (state.scale == 1).view(*rows.shape[:-1], 1)
            rows = torch.where(keep, rows, instead)
            return (rows, *others) if others else rows

        return hook

    for branch in decoder.branches:
        handles.append(branch.exit.register_forward_hook(cut(branch), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def zeroed(branches):
    """The MLPs named, with every weight and bias zero."""
    parameters = {p: p.clone() for b in branches for m in (b.entry, b.exit) for p in m.parameters()}
    try:
        for parameter in parameters:
            parameter.zero_()
        yield
    finally:
        for parameter, value in parameters.items():
            parameter.copy_(value)


def generate(model, ids):
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, eos_token_id=None, use_cache=True
    )


@pytest.fixture(params=FAMILIES, scope="module")
def family(request):
    return request.param


def test_never_is_bit_identical(family):
    model, ids = build(family), ids_for(2, 7)
    stock, text = logits_of(model, ids), generate(model, ids)
    with skipping(model, "never") as run:
        assert torch.equal(logits_of(model, ids), stock)
        assert torch.equal(generate(model, ids), text)
    assert run.skip_ratio == 0
    assert run.tokens == 14 + (2 * (7 + 8 + 9 + 10) if family == "openai-gpt" else 2 * (7 + 1 + 1 + 1))


def test_always_equals_a_model_whose_mlps_are_zero(family):
    model, ids = build(family), ids_for(2, 7)
    decoder = find_decoder(model)
    stock = logits_of(model, ids)
    with skipping(model, "always:1") as run:
        got = logits_of(model, ids)
    assert run.skipped_per_layer == [0] + [14] * (decoder.num_layers - 1)
    with zeroed(decoder.branches[1:]):
        assert torch.equal(got, logits_of(model, ids))
    assert torch.equal(logits_of(model, ids), stock)
    assert not torch.allclose(got, stock, atol=1e-3)


def test_packed_rows_agree_with_a_masked_reference(family):
    model, ids = build(family), ids_for(3, 9)
    decoder = find_decoder(model)
    with masked(decoder, RandomGate(decoder.num_layers, 0.5), (3, 9)):
        expected = logits_of(model, ids)
    with skipping(model, RandomGate(decoder.num_layers, 0.5)) as run:
        got = logits_of(model, ids)
    assert 0.3 < run.skip_ratio < 0.7
    # a matmul over fewer rows may add in another order
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_cached_decoding_agrees_with_the_uncached_pass(family):
    if family in NO_CACHE:
        pytest.skip(NO_CACHE[family])
    model, ids = build(family), ids_for(2, 9)
    layers = find_decoder(model).num_layers

    def whole_and_stepwise():
        out = model(input_ids=ids[:, :5], attention_mask=torch.ones_like(ids[:, :5]), use_cache=True)
        steps = [out.logits]
        for t in range(5, 9):
            mask, past = torch.ones_like(ids[:, : t + 1]), out.past_key_values
            out = model(input_ids=ids[:, t : t + 1], attention_mask=mask, past_key_values=past, use_cache=True)
            steps.append(out.logits)
        return logits_of(model, ids), torch.cat(steps, 1)

    atol = 1e-4
    if family in CACHE_SHOWS:
        stock, stepwise = whole_and_stepwise()
        atol = 2 * (stock - stepwise).abs().max().item()
        assert atol < 1e-2
    with skipping(model, AlwaysGate(layers, 1, Guards(sinks=2))) as run:
        whole, stepwise = whole_and_stepwise()
    assert run.skipped_per_layer == [0] + [2 * 2 * 7] * (layers - 1)
    torch.testing.assert_close(stepwise, whole, rtol=1e-3, atol=atol)


def test_left_padding_changes_nothing_that_the_model_itself_does_not_change(family):
    model, ids = build(family), ids_for(2, 8)
    decoder = find_decoder(model)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = (padded != 0).long()
    position = (mask.cumsum(1) - 1).clamp_min(0)
    gate = AlwaysGate(decoder.num_layers, 1, Guards(sinks=2))
    takes = {"attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        takes["position_ids"] = position
    with masked(decoder, gate, (2, 11), position=position.flatten(), real=mask.flatten().bool()):
        expected = logits_of(model, padded, **takes)
    with skipping(model, gate) as run:
        alone, together = logits_of(model, ids), logits_of(model, padded, **takes)
    assert run.tokens == 2 * 16
    assert run.skipped_per_layer == [0] + [2 * 2 * 6] * (decoder.num_layers - 1)
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)
    if family not in PADDING_SHOWS:
        torch.testing.assert_close(together[:, 3:], alone, rtol=1e-3, atol=1e-4)


def test_the_output_head_gives_the_models_own_logits(family):
    decoder = find_decoder(build(family))
    if family in CURVED_HEAD:
        with pytest.raises(InputError, match="not a linear map"):
            decoder.check_head()
    else:
        decoder.check_head()


def test_checkpoints_are_the_hidden_states_of_transformers(family):
    model, ids = build(family), ids_for(2, 7)
    decoder = find_decoder(model)
    hidden = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    for layer in range(decoder.num_layers):
        seen: list[torch.Tensor] = []
        handle = decoder.at_checkpoint(layer, seen.append)
        try:
            if family in STREAMS:
                with pytest.raises(InputError, match="several streams"):
                    logits_of(model, ids)
            else:
                logits_of(model, ids)
                assert torch.equal(seen[0], hidden[layer])
        finally:
            handle.remove()


def others() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    return sorted(set(KNOWN) - {family.split("/")[0] for family in FAMILIES})


@pytest.mark.parametrize("family", others())
def test_every_other_model_is_found_or_refused_with_its_structure(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.for_model(family)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        pytest.skip(f"transformers builds none from the default configuration: {error}"[:120])
    if family not in REFUSED:
        with contextlib.suppress(InputError):
            assert find_decoder(model).num_layers
        return
    with pytest.raises(InputError, match=REFUSED[family]) as refusal:
        find_decoder(model)
    assert len(refusal.value.message.splitlines()) > 3


def test_an_encoder_decoder_is_refused():
    from transformers import AutoModelForSeq2SeqLM, T5Config

    config = T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    with pytest.raises(InputError, match="encoder-decoder") as refusal:
        find_decoder(AutoModelForSeq2SeqLM.from_config(config))
    assert "T5Stack" in refusal.value.message


def test_a_vision_tower_of_as_many_layers_is_not_taken_for_the_language_model():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = size | {"vocab_size": 97, "num_key_value_heads": 2, "head_dim": 8}
    vision = size | {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    model = Gemma3ForConditionalGeneration(config).eval()
    decoder = find_decoder(model)
    assert decoder.backbone is model.model.language_model
    decoder.check_head()
    with skipping(model, "always:1") as run:
        model(input_ids=ids_for(1, 5))
    assert run.skipped_per_layer == [0, 5, 5]


def test_a_model_that_adds_rows_is_refused_when_it_runs():
    """ProphetNet carries its predicted n-grams through the layers as further rows."""
    from transformers import ProphetNetConfig, ProphetNetForCausalLM

    config = ProphetNetConfig(
        vocab_size=97,
        hidden_size=32,
        decoder_ffn_dim=48,
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_decoder_attention_heads=4,
    )
    with skipping(ProphetNetForCausalLM(config).eval(), "always:1") as run, pytest.raises(InputError, match="rows"):
        run.decoder.model(ids_for(1, 5))
