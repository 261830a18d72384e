"""What the graph engine must not take for what it is not: positions a model lacks, layers that do not rotate, shapes, dtypes, batches."""

from __future__ import annotations

import pytest
import torch
from conftest import save_tiny, tiny_model, words

from sedac_cli.config import ModelSpec
from sedac_cli.errors import InputError
from sedac_cli.models import load_model
from sedac_cli.runtime.generate import GenerateOptions, check_room, generate
from sedac_cli.runtime.graph import GraphEngine
from sedac_cli.runtime.graph.capture import why
from sedac_cli.runtime.graph.rotation import last_place
from sedac_cli.runtime.graph.standard import NotStandardError, check_kernels, standard_model
from sedac_cli.runtime.plan import make_plan
from sedac_cli.structure import find_decoder

SHAPE = {"hidden_size": 64, "max_position_embeddings": 512}
OPTIONS = GenerateOptions(max_new_tokens=12, ignore_eos=True)


def loaded_of(folder, family="qwen2", dtype="float32", change=None, **config):
    return load_model(ModelSpec(ref=str(save_tiny(folder, family, change=change, **SHAPE | config)), dtype=dtype))


def engine_of(loaded, batch=1, max_length=400, **options):
    plan = make_plan("never", loaded.decoder)
    return GraphEngine(loaded, plan, batch=batch, max_length=max_length, capture=False, **options)


def as_eager(loaded, engine, prompts):
    expected = generate(loaded, make_plan("never", loaded.decoder).gate, prompts, OPTIONS)
    return engine.generate(prompts, OPTIONS).texts == expected.texts


# Positions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "config"), [("qwen2", {"max_position_embeddings": 64}), ("gpt2", {"max_position_embeddings": 64, "n_inner": 64, "n_embd": 64,
                                                                               "n_head": 4, "n_layer": 4})]
)  # fmt: skip
@pytest.mark.parametrize("count", [17, 30])
def test_the_models_last_position_is_the_eager_engines(tmp_path, family, config, count):
    loaded = loaded_of(tmp_path, family, **config)
    engine, plan = engine_of(loaded), make_plan("never", loaded.decoder)
    with pytest.raises(InputError, match="exceed the model's 64 positions") as eager:
        generate(loaded, plan.gate, [words(count)], OPTIONS)
    with pytest.raises(InputError) as graph:
        engine.generate([words(count)], OPTIONS)
    assert (graph.value.message, graph.value.hint) == (eager.value.message, eager.value.hint)
    ids = torch.ones(1, 53, dtype=torch.long)
    with pytest.raises(InputError, match="a prompt of 53 tokens and 12 new ones exceed"):
        engine.run(ids, torch.ones_like(ids), OPTIONS)
    engine.run(ids[:, 1:], torch.ones_like(ids[:, 1:]), OPTIONS)


@pytest.mark.parametrize(
    ("prompt", "hint"),
    [
        (508, "--max-new-tokens 4 or a shorter prompt"), (511, "--max-new-tokens 1 or a shorter prompt"),
        (512, "a prompt of at most 511 tokens"), (2101, "a prompt of at most 511 tokens"),
    ],
)  # fmt: skip
def test_the_way_out_is_one(tmp_path, prompt, hint):
    with pytest.raises(InputError) as caught:
        check_room(loaded_of(tmp_path), prompt, 12)
    assert caught.value.hint == hint


def far(change):
    """Of models that rotate: whatever else they do with positions is there from 256 on."""
    return {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1} | change


LARGE = 300.0
"""Of a key's bias in Qwen2.5: what rounds to 1 in bfloat16."""


def large_biases(model):
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias[7] = LARGE  # turns slowest
        layer.self_attn.k_proj.bias[15] = -LARGE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "config", "said"),
    [
        ("smollm3", {}, "layer 3 does not rotate its keys"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 1]}, "layer 1 does not rotate its keys"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, None),
        ("glm", {"head_dim": 16}, "layer 0 rotates its keys in a way of its own"),
        ("ernie4_5", {}, "layer 0 rotates its keys in a way of its own"),
        ("gemma3_text", {"head_dim": 16, "sliding_window": 512}, "its rotary positions take other arguments"),
        ("ministral3", {"rope_parameters": far({"original_max_position_embeddings": 256})},
            "the attention of layer 0 does more with positions than rotate"),
        ("ministral3", {"rope_parameters": far({"original_max_position_embeddings": 4096})}, None),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "attention_factor": 2.0}}, None),
        ("phi3", {"partial_rotary_factor": 0.5}, None),
        ("qwen2", {"change": large_biases}, None),
    ],
)  # fmt: skip
def test_what_a_layer_does_with_positions_is_measured(tmp_path, family, config, said, dtype):
    loaded = loaded_of(tmp_path, family, dtype, **config)
    engine = engine_of(loaded)
    assert engine.path == ("fused" if said is None else "generic"), engine.notes
    if said is not None:
        assert said in engine.notes[0]
    if dtype == "float32":
        assert as_eager(loaded, engine, [words(80)])


def later(loaded):
    """Queries twice as large from position 256 on, by hooks: in no signature, and in no key."""
    seen = {}

    def note(module, args, kwargs):
        position = kwargs.get("position_ids")
        seen["scale"] = 1 if position is None else (1 + (position >= 256)).unsqueeze(-1)

    loaded.decoder.backbone.register_forward_pre_hook(note, with_kwargs=True)
    for layer in loaded.decoder.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda module, args, out: out * seen["scale"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_begins_later_is_looked_for_where_the_cache_ends(tmp_path, dtype):
    loaded = loaded_of(tmp_path, "llama", dtype)
    later(loaded)
    engine = engine_of(loaded)
    assert engine.path == "generic"
    assert "its layers look standard, but the kernels' logits are off by" in engine.notes[0]
    assert engine_of(loaded, max_length=200).path == "fused"  # such a cache never gets there


def small(model):
    """Attention that says little: what is wrong in it hides behind the rest for the first few tokens."""
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and "embed" not in name and "lm_head" not in name:
            parameter.mul_(0.5)


def test_a_layer_that_does_not_rotate_is_seen_where_logits_hardly_differ(tmp_path):
    loaded = loaded_of(tmp_path, "smollm3", "bfloat16", small, num_hidden_layers=12, max_position_embeddings=2048)
    assert engine_of(loaded, max_length=1600).notes[0].endswith("layer 3 does not rotate its keys")


def test_where_an_engine_looks_last():
    def place(places, family="llama", **config):
        return last_place(find_decoder(tiny_model(family, hidden_size=64, **config)), places)

    assert (place(100), place(1000)) == (99, 127)
    dynamic = {"rope_parameters": {"rope_theta": 1e4, "factor": 4.0, "rope_type": "dynamic"}}
    assert place(1000, **dynamic) == 127
    long = {"rope_theta": 1e4, "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    assert place(1000, "phi3", rope_parameters=long, original_max_position_embeddings=32) == 31
    assert place(1000, "bloom", n_layer=4, n_head=4, max_position_embeddings=None) == 0


# Shapes and batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "dtype", "said"),
    [
        ({}, torch.bfloat16, None),
        ({}, torch.float16, None),
        ({}, torch.float32, "float16 and bfloat16"),
        ({"intermediate_size": 50}, torch.bfloat16, "divisible by 8, here 50"),
        ({"hidden_size": 68, "head_dim": 16}, torch.bfloat16, "divisible by 8, here 68"),
    ],
)
def test_shapes_that_kernels_do_not_read(config, dtype, said):
    decoder = find_decoder(tiny_model("llama", **SHAPE | config).to(dtype))
    standard = standard_model(decoder)
    if said is None:
        return check_kernels(standard, decoder)
    with pytest.raises(NotStandardError, match=said):
        check_kernels(standard, decoder)


def test_weights_of_several_kinds():
    decoder = find_decoder(tiny_model("llama", **SHAPE).to(torch.bfloat16))
    decoder.backbone.norm.float()
    with pytest.raises(NotStandardError, match=r"of one kind: torch.bfloat16 on cpu, here torch.float32"):
        check_kernels(standard_model(decoder), decoder)


def test_an_engine_on_a_gpu_asks(tmp_path):
    engine = engine_of(loaded_of(tmp_path, dtype="bfloat16", intermediate_size=50))
    assert engine.path == "fused"  # the twins take any width
    engine.device = torch.device("cuda")
    with pytest.raises(InputError, match=r"cannot run fused: .* divisible by 8"):
        engine._make_step(fused=True)


def test_float64_is_refused(tmp_path):
    loaded = loaded_of(tmp_path)
    loaded.model.double()
    with pytest.raises(InputError, match=r"computes in torch.float64: .* float32, float16 and bfloat16") as caught:
        engine_of(loaded)
    assert caught.value.hint.startswith("--dtype float32, or --engine eager")


def test_a_model_on_several_devices_is_refused(tmp_path):
    loaded = loaded_of(tmp_path)
    loaded.decoder.layers[2].to("meta")
    with pytest.raises(InputError, match=r"Qwen2ForCausalLM is spread over cpu, meta: .* one GPU") as caught:
        engine_of(loaded)
    assert caught.value.hint.startswith("no --device-map, or --engine eager")


def test_a_batch_too_large_for_the_kernels_runs_through_the_models_own_code(tmp_path):
    loaded = loaded_of(tmp_path)
    engine = engine_of(loaded, batch=65)
    assert engine.path == "generic"
    assert engine.notes == [
        "steps run through the model's own code: 65 sequences at once: the decode kernels take up to 64"
    ]
    assert as_eager(loaded, engine, [words(3 + n % 5, n) for n in range(65)])


def test_a_batch_too_large_for_either(tmp_path):
    loaded = loaded_of(tmp_path, "mistral", sliding_window=40)
    assert engine_of(loaded, batch=64).path == "fused"
    with pytest.raises(InputError, match=r"65 sequences at once: .* window of 40 tokens") as caught:
        engine_of(loaded, batch=65)
    assert caught.value.hint == (
        "--engine eager (of sedac serve: --backend eager), or at most 64 sequences at once (--batch)"
    )


def test_a_smaller_batch_is_not_the_way_out_for_a_model_that_none_can_serve(tmp_path):
    loaded = loaded_of(tmp_path, "bloom", n_layer=4, n_head=4)
    with pytest.raises(InputError, match="its code is not written for it") as caught:
        engine_of(loaded, batch=65)
    assert "unpack" not in caught.value.message
    assert caught.value.hint == "--engine eager (of sedac serve: --backend eager)"


def test_a_window_is_as_long_as_the_hint_says(tmp_path):
    loaded = loaded_of(tmp_path, "gemma2", head_dim=16, sliding_window=24)
    with pytest.raises(InputError, match="window of 24 tokens, the cache is for 25") as caught:
        engine_of(loaded, max_length=25)
    assert caught.value.hint.endswith(", or at most 24 tokens in all")
    ids = loaded.tokenizer(words(6), return_tensors="pt")["input_ids"][:, :12]
    done = engine_of(loaded, max_length=24).run(ids, torch.ones_like(ids), OPTIONS)
    expected = loaded.model.generate(ids, max_new_tokens=12, eos_token_id=None, do_sample=False)
    assert torch.equal(torch.cat([done.first, done.tokens[:, 0]]), expected[0, 12:])


# Capturing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("torch_says", "says"),
    [
        ("Cannot copy between CPU and CUDA tensors during CUDA graph capture unless the CPU tensor is pinned. Please use "
         "tensor.pin_memory() or allocate the tensor with pin_memory=True.", "needs the host"),
        ("CUDA error: operation not permitted when stream is capturing\nFor debugging consider", "needs the host"),
        ("CUDA error: invalid argument\nFor debugging consider", "CUDA error: invalid argument"),
        ("", "RuntimeError"),
    ],
)  # fmt: skip
def test_why_a_step_cannot_be_captured_is_one_line_about_the_model(torch_says, says):
    assert why(RuntimeError(torch_says)).endswith(says)
