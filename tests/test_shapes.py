"""Random weights in a known shape: they load like a model, run in every engine, and are named for what they are."""

from __future__ import annotations

import pytest
import torch

from sedac_cli import shapes
from sedac_cli.errors import InputError, UsageError
from sedac_cli.runtime.generate import GenerateOptions, generate
from sedac_cli.runtime.plan import make_plan
from sedac_cli.shapes import SHAPES, shaped_model

SMALL = {"num_hidden_layers": 2, "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_runs_and_keeps_its_states_in_bounds(name):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2} | ({"head_dim": 16} if "qwen3" in name else {})
    loaded = shaped_model(name, "cpu", torch.float32, **SMALL | heads)
    assert loaded.identity.ref == f"shape:{name}"
    ids = torch.arange(1, 40).unsqueeze(0)
    logits = loaded.model(input_ids=ids).logits
    assert torch.isfinite(logits).all()
    assert 0.05 < float(logits.std()) < 20
    result = generate(loaded, make_plan("never", loaded.decoder).gate, ["1 2 3"], GenerateOptions(max_new_tokens=4))
    assert result.new_tokens > 0


def test_positions_of_a_shape_are_those_of_its_family():
    """Buffers that are no parameters are made anew, not left as whatever memory held."""
    loaded = shaped_model("llama-3.1-8b", "cpu", torch.float32, **SMALL, num_attention_heads=4, num_key_value_heads=2)
    inv_freq = loaded.model.model.rotary_emb.inv_freq
    theta = loaded.model.config.rope_parameters["rope_theta"]
    expected = 1.0 / theta ** (torch.arange(0, 16, 2).float() / 16)
    assert torch.allclose(inv_freq.float(), expected)


def test_what_does_not_fit_into_memory_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(shapes, "_free_memory", lambda: 2**20)
    with pytest.raises(InputError, match=r"qwen2.5-7b in bfloat16 takes 14.2 GiB, and 0.0 GiB"):
        shaped_model("qwen2.5-7b", "cpu", torch.bfloat16)


def test_an_unknown_shape_is_named():
    with pytest.raises(UsageError, match="gpt-17"):
        shaped_model("gpt-17", "cpu")
