"""Every family's configuration as a tiny random model, and what a family cannot do: the tables of test_architectures.

Families are told apart by their configuration alone; nothing here, and nothing in sedac, knows a class name.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

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


def small_config(family: str, **sizes: int):
    from transformers import CONFIG_MAPPING, AutoConfig

    name, changes = family.split("/")[0], FAMILIES.get(family, {})
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")
    default = AutoConfig.for_model(name)
    text = default.get_text_config()
    known = {k: v for k, v in (SMALL | sizes).items() if k in text.to_dict() or k in text.attribute_map} | changes
    if text is default:
        return AutoConfig.for_model(name, **known)
    return AutoConfig.for_model(name, text_config={"model_type": text.model_type, **known})


@functools.lru_cache(maxsize=1)
def build(family: str, **sizes: int) -> Any:
    """A random float32 model whose biases and norms are random too, so that nothing is zero or one by accident."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(family, **sizes), attn_implementation="eager")
    model = model.float().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() < 2 else 0.05))
    return model
