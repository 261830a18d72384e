"""Fixtures: tiny random models made on the fly, the built-in model loaded once. No test touches the network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


def tiny_config(family: str = "qwen2", **changes):
    from transformers import AutoConfig

    values = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | changes
    return AutoConfig.for_model(family, **values)


def tiny_model(family: str = "qwen2", seed: int = 0, **changes):
    """A random float32 model, seeded, in eval mode."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(family, **changes)).float().eval().requires_grad_(False)


@pytest.fixture(scope="session")
def builtin():
    """The built-in model, float32 on CPU."""
    from sedac_cli.models import load_model

    return load_model("builtin:tiny")
