"""Random weights in a known shape: they load like a model, run in every engine, and are named for what they are."""

from __future__ import annotations

import json

import pytest
import torch

from sedac_cli import shapes
from sedac_cli.errors import InputError, UsageError
from sedac_cli.runtime.generate import GenerateOptions, generate
from sedac_cli.runtime.plan import make_plan
from sedac_cli.shapes import SHAPES, shaped_model

SMALL = {"num_hidden_layers": 2, "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96}


def test_the_help_names_every_shape(sedac):
    said = "".join(sedac("bench", "--help").out.replace("│", " ").split())
    assert all(name in said for name in SHAPES)


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


# From the command line ------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """A shape of a size for tests."""
    family, values = SHAPES["qwen2.5-0.5b"]
    monkeypatch.setitem(
        SHAPES, "small", (family, values | SMALL | {"num_attention_heads": 4, "num_key_value_heads": 2})
    )


@pytest.fixture
def bench(sedac, tmp_path, small):
    quick = ("--new-tokens", 3, "--repeats", 1, "--warmup", 0, "--prompt-lengths", "4")

    def call(*args):
        return sedac("bench", "--save-dir", tmp_path / "out", *quick, *args)

    call.document = lambda: json.loads((tmp_path / "out" / "bench.json").read_text())
    return call


def test_a_shape_has_the_precision_that_is_asked_for(bench):
    assert bench("--shape", "small", "--dtype", "bfloat16").code == 0
    assert bench.document()["subject"]["dtype"] == "bfloat16"
    assert bench("--shape", "small").code == 0
    assert bench.document()["subject"]["dtype"] == ("bfloat16" if torch.cuda.is_available() else "float32")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--dtype", "flaot16"), "--dtype: 'flaot16' is not known. Did you mean 'float16'?"),
        (("--load-in-4bit",), "--load-in-4bit is about the files of a model"),
        (("--device-map", "auto"), "--device-map is about the files"),
        (("--revision", "main"), "--revision is about the files"),
        (("--trust-remote-code",), "--trust-remote-code is about the files"),
        (("--backend", "vllm"), "--backend vllm knows no shape:small"),
    ],
)
def test_what_a_shape_has_no_use_for_is_refused(bench, monkeypatch, args, says):
    monkeypatch.setattr(shapes, "shaped_model", lambda *args: pytest.fail("it was made"))
    result = bench("--shape", "small", *args)
    assert (result.code, says in result.err) == (2, True), result.err


def test_a_misspelt_shape_is_named(bench):
    result = bench("--shape", "qwen2.5-7")
    assert (result.code, "Did you mean 'qwen2.5-7b'?" in result.err) == (2, True)


def test_random_weights_are_named_however_they_are_asked_for(bench, tmp_path):
    matrix = tmp_path / "m.json"
    experiments = [{"name": "dense", "mode": "dense"}]
    work = {"prompts": "synthetic", "quality": {"samples": 0}}
    matrix.write_text(json.dumps({"base_model": "shape:small", "experiments": experiments} | work))
    for args in (("--matrix", matrix), ("--shape", "small"), ("--model", "shape:small", "--prompts", "synthetic")):
        result = bench(*args, "--quality-samples", 0)
        assert result.code == 0, result.err
        assert "shape:small: RANDOM weights" in result.err
        assert "(random weights)" in result.out
        assert bench.document()["random_weights"]
        assert "**random weights" in (tmp_path / "out" / "report.md").read_text()
