"""Loading: every reference, precision and device, and what is said when it cannot be done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import save_tiny, tiny_tokenizer

from sedac_cli.config import ModelSpec
from sedac_cli.costs import model_costs
from sedac_cli.errors import InputError, UsageError
from sedac_cli.models import load_model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_precisions_on_the_cpu(tiny_folder, dtype):
    loaded = load_model(ModelSpec(str(tiny_folder), dtype=dtype))
    assert {p.dtype for p in loaded.model.parameters()} == {getattr(torch, dtype)}
    assert loaded.identity.dtype == dtype
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())


def test_auto_on_the_cpu_is_float32_whatever_the_checkpoint(tmp_path):
    folder = save_tiny(tmp_path / "m", change=lambda model: model.bfloat16())
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_model(ModelSpec(str(folder), device="cpu")).model.dtype == torch.float32


@pytest.mark.parametrize(
    ("spec", "kind", "said"),
    [
        (ModelSpec("builtin:nix"), InputError, "there is no built-in model 'nix'"),
        (ModelSpec("./nowhere"), InputError, "no model folder at ./nowhere"),
        (ModelSpec("/no/such/place"), InputError, "no model folder at /no/such/place"),
        (ModelSpec(dtype="int7"), UsageError, "--dtype: 'int7' is not known"),
        (ModelSpec(device="tpuu"), UsageError, "--device: 'tpuu' is not a device"),
    ],
)
def test_mistakes(spec, kind, said):
    with pytest.raises(kind, match=said):
        load_model(spec)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_a_gpu_asked_for_by_name_is_not_replaced(sedac, tiny_folder):
    result = sedac("generate", "--model", tiny_folder, "--prompt", "x", "--device", "cuda")
    assert result.code == 3
    assert "no usable GPU" in result.err
    assert load_model(ModelSpec(str(tiny_folder), device="auto")).device.type == "cpu"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", None, "holds no config.json"),
        ("config.json", b"{", "cannot load the model"),
        ("config.json", b'{"model_type": "nix"}', "cannot load the model"),
        ("model.safetensors", None, "cannot load the model"),
        ("model.safetensors", b"short", "cannot load the model"),
        ("tokenizer.json", b"{", "cannot load the tokenizer"),
    ],
)
def test_damaged_folders(tmp_path, tiny_folder, name, content, said):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "m"))
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        load_model(str(folder))


def test_a_tokenizer_without_special_tokens_can_still_pad(tmp_path):
    folder = save_tiny(tmp_path / "m")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    loaded = load_model(str(folder))
    assert loaded.tokenizer(["a", "bcd"], padding=True)["input_ids"][0][1:] == [loaded.tokenizer.pad_token_id] * 2


# Four bits ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """A model of quantizable sizes in full and in 4 bits; skipped where bitsandbytes cannot do this."""
    pytest.importorskip("bitsandbytes")
    folder = save_tiny(tmp_path_factory.mktemp("m") / "wide", hidden_size=64, intermediate_size=128)
    try:
        small = load_model(ModelSpec(str(folder), load_in_4bit=True))
        small.model(torch.tensor([[5, 6]]))
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"no 4-bit arithmetic on this machine: {error}")
    return folder, load_model(str(folder)), small


def test_four_bits_are_four_bits_and_cost_what_they_stand_for(four):
    _, full, small = four
    name = type(small.model.model.layers[0].mlp.up_proj).__name__
    assert name == "Linear4bit"
    assert model_costs(small.decoder, 64) == model_costs(full.decoder, 64)
    assert small.identity.quantized
    full.identity.require_same(small.identity, "x")


def test_never_in_four_bits_is_the_stock_quantized_model(four):
    from sedac_cli import skipping

    _, full, small = four
    ids = torch.arange(3, 23).unsqueeze(0)
    stock = small.model(ids).logits
    assert not torch.equal(stock, full.model(ids).logits)
    with skipping(small.model, "never"):
        assert torch.equal(small.model(ids).logits, stock)
    with skipping(small.model, "always:2") as run:
        assert not torch.equal(small.model(ids).logits, stock)
    assert run.skip_ratio == 0.5


def test_the_pipeline_runs_in_four_bits(four, sedac, tmp_path, text_file):
    folder, *_ = four
    model = ("--model", folder, "--load-in-4bit")
    size = ("--samples", 8, "--max-length", 32, "--layers", "1,2")
    collected = sedac("collect", *model, "--dataset", text_file, *size, "--save-dir", tmp_path / "d", "--json")
    assert collected.code == 0, collected.err
    assert collected.json["tokens"] == 256
    manifest = json.loads((tmp_path / "d/manifest.json").read_text())
    assert manifest["model"]["quantized"] is True
    assert manifest["model"]["matrix_sample"] == []
    result = sedac("generate", *model, "--prompt", "the sea", "--max-new-tokens", 3, "--gate", "always:2", "--json")
    assert result.code == 0, result.err
    assert result.json["skip_ratio_decode"] == 0.5
