"""Any decoder-only architecture: for each family, the promises of the runtime on a tiny random model.

Families are told apart by their configuration alone; nothing here, and nothing in sedac, knows a class name.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from typing import Any

import pytest
import torch

from sedac_cli import skipping
from sedac_cli.errors import InputError
from sedac_cli.gates.base import Gate, Guards
from sedac_cli.gates.simple import AlwaysGate, RandomGate
from sedac_cli.structure import Decoder, find_decoder

# Small values for every size a configuration may name; a family takes those it knows.
SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "sliding_window": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    # the names of older families
    "n_embd": 32, "d_model": 32, "ffn_dim": 48, "n_inner": 48, "n_positions": 64, "rotary_dim": 4,
    "decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
    "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
    # experts
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "hidden_size_per_layer_input": 8,
    # latent attention, linear attention, state spaces
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 16, "q_lora_rank": 16,
    "index_n_heads": 2, "index_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_heads": 4, "linear_head_dim": 8,
    "mamba_d_state": 8, "mamba_d_head": 16, "mamba_n_heads": 4, "mamba_chunk_size": 8, "mamba_d_ssm": 64,
}  # fmt: skip

LATENT = {"num_key_value_heads": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
FOUR = {"num_hidden_layers": 4}  # hybrids put attention into every fourth layer

# Family, or family/variant: what its configuration needs beside SMALL.
FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "apertus": {},
    "arcee": {},
    "bamba": {"attn_layer_indices": [1]},
    "bart": {},
    "beam": {},
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "bloom/residual_after_norm": {"apply_residual_connection_post_layernorm": True},
    "codegen": {},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {},
    "cohere2_moe": {},
    "ctrl": {},
    "cwm": {},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v4": {},
    "diffllama": {},
    "doge": {},
    "dots1": {},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone4": {},
    "exaone_moe": {},
    "falcon": {},
    "falcon/new_decoder": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon/serial_alibi": {"parallel_attn": False, "alibi": True, "multi_query": False},
    "falcon_h1": {"lm_head_multiplier": 2.0},
    "flex_olmo": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "gemma3n_text": {
        "laurel_rank": 4,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
    },
    "gemma4_text": {"vocab_size_per_layer_input": 97},
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "num_hidden_layers": 4},
    "gpt_neox": {},
    "gpt_neox/serial": {"use_parallel_residual": False},
    "gpt_oss": {},
    "gptj": {},
    "granite": {"logits_scaling": 4.0},
    "granitemoe": {"logits_scaling": 4.0},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"], "shared_intermediate_size": 16},
    "granitemoeshared": {"shared_intermediate_size": 16},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {},
    "hy_v4": {},
    "hyperclovax": {"logits_scaling": 0.25},
    "inkling_text": {},
    "jais2": {},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 1},
    "jetmoe": {},
    "kimi_linear": LATENT | {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "lfm2": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "llama": {},
    "llama4_text": {},
    "minicpm3": LATENT,
    "minimax": {},
    "ministral": {},
    "mistral": {},
    "mixtral": {},
    "mllama": {},
    "modernbert-decoder": {},
    "mpt": {},
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmo_hybrid": FOUR,
    "olmoe": {},
    "openai-gpt": {},
    "opt": {},
    "opt/post_norm_projected": {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_5_text": FOUR,
    "qwen3_moe": {},
    "qwen3_next": FOUR,
    "recurrent_gemma": {},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "stablelm/parallel": {"use_parallel_residual": True},
    "starcoder2": {},
    "trocr": {},
    "vaultgemma": {},
    "xglm": {},
    "youtu": LATENT,
}

# What a family cannot do in stock form, or has no single meaning for.
NO_CACHE = {
    "openai-gpt": "knows no cache",
    "recurrent_gemma": "keeps its state in its own modules and returns none",
}
CACHE_SHOWS = {"bamba": "its one-token state update leaves out a clamp that its whole pass applies"}
PADDING_SHOWS = {
    "bart": "counts absolute positions from the padding on and takes no position_ids",
    "trocr": "counts absolute positions from the padding on and takes no position_ids",
    "recurrent_gemma": "its recurrence runs through the padding",
}
STREAMS = {"deepseek_v4": "hyper-connections", "hy_v4": "hyper-connections", "gemma3n_text": "AltUp"}
CURVED_HEAD = {"modernbert-decoder": "a dense layer and a norm stand between the last hidden state and the logits"}

# Refused, and the words that say why.
REFUSED = {
    "mamba": "which part of decoder layer 0 is its MLP",
    "falcon_mamba": "which part of decoder layer 0 is its MLP",
    "bert": "which part of decoder layer 0 is its MLP",
    "roberta": "which part of decoder layer 0 is its MLP",
    "zamba": "which part of decoder layer",
    "rwkv": "no list of",
    "xlstm": "no list of",
    "xlnet": "no list of",
    "nemotron_h": "no list of",
    "longcat_flash": "no list of",
    "hrm_text": "no list of",
    "zaya": "prev_router_hidden_states",
    "blt": "names no hidden_size",
}


def small_config(family: str):
    from transformers import CONFIG_MAPPING, AutoConfig

    name, changes = family.split("/")[0], FAMILIES.get(family, {})
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")
    default = AutoConfig.for_model(name)
    text = default.get_text_config()
    known = {k: v for k, v in SMALL.items() if k in text.to_dict() or k in text.attribute_map} | changes
    if text is default:
        return AutoConfig.for_model(name, **known)
    return AutoConfig.for_model(name, text_config={"model_type": text.model_type, **known})


@functools.lru_cache(maxsize=1)
def build(family: str) -> Any:
    """A random float32 model whose biases and norms are random too, so that nothing is zero or one by accident."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(family), attn_implementation="eager")
    model = model.float().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() < 2 else 0.05))
    return model


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
