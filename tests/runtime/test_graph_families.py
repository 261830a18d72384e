"""Every family through the graph engine: the tokens of the eager runtime, or a refusal that says why. Never other tokens, and never an
error of ours. On the CPU steps run one by one; on a GPU they are captured."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny_tokenizer
from families import FAMILIES, build

from sedac_cli import skipping
from sedac_cli.errors import InputError
from sedac_cli.models import adopt_model
from sedac_cli.runtime.generate import GenerateOptions
from sedac_cli.runtime.graph import GraphEngine
from sedac_cli.runtime.plan import make_plan

NEW = 16
STANDARD = {"hidden_size": 64, "head_dim": 16}
"""Sizes that the decode kernels take."""
FUSED = [
    "cwm", "gemma", "granite", "llama", "ministral", "mistral", "mllama", "phi3", "qwen2", "qwen3", "seed_oss",
]  # fmt: skip
NO_KEYS = "keeps no keys and values per layer"
KINDS = "has layers of kind"
POSITIONS = "counts or masks positions in a way of its own"
ONE_TOKEN = "cannot take one token over a cache of fixed size"
REFUSED = {
    "bamba": NO_KEYS, "granitemoehybrid": NO_KEYS, "jamba": NO_KEYS, "kimi_linear": NO_KEYS, "lfm2_moe": NO_KEYS,
    "minimax": NO_KEYS, "olmo_hybrid": NO_KEYS, "openai-gpt": NO_KEYS, "qwen3_5_text": NO_KEYS, "qwen3_next": NO_KEYS,
    "recurrent_gemma": NO_KEYS, "deepseek_v4": KINDS, "falcon_h1": KINDS, "hy_v4": KINDS, "inkling_text": KINDS,
    "bart": POSITIONS, "trocr": POSITIONS, "bloom": ONE_TOKEN, "bloom/residual_after_norm": ONE_TOKEN,
    "falcon/serial_alibi": ONE_TOKEN,
}  # fmt: skip
EXPERTS = [
    "afmoe", "cohere2_moe", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe", "gpt_oss",
    "granitemoe", "granitemoeshared", "hunyuan_v1_moe", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe",
]  # fmt: skip
"""Their products are grouped on the device in bfloat16, by the host otherwise."""
REFUSED_CAPTURED = REFUSED | {"jetmoe": "needs the host"}
REFUSED_WITH_A_GATE = {"gemma3n_text": "several streams"}
"""By eager too."""


def eager(model, ids, spec):
    def tokens():
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, use_cache=True,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        return made[:, ids.shape[1] :]

    if spec == "never":
        return tokens()
    with skipping(model, spec):
        return tokens()


def graph(loaded, ids, spec, capture=False):
    engine = GraphEngine(
        loaded, make_plan(spec, loaded.decoder), batch=ids.shape[0], max_length=ids.shape[1] + NEW, capture=capture
    )
    run = engine.run(ids, torch.ones_like(ids), GenerateOptions(max_new_tokens=NEW, ignore_eos=True))
    return torch.cat([run.first.unsqueeze(0), run.tokens]).T, engine.path


def agree(family, spec, path, **sizes):
    model = build(family, **sizes)
    loaded = adopt_model(model, tiny_tokenizer(), family)
    for batch in (1, 2):
        ids = torch.randint(3, 97, (batch, 10), generator=torch.Generator().manual_seed(batch))
        found, taken = graph(loaded, ids, spec)
        assert taken == path
        assert found.tolist() == eager(model, ids, spec).tolist()


@pytest.mark.parametrize("spec", ["never", "always:1"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_eager_or_the_family_is_refused(family, spec):
    reason = REFUSED.get(family) or (REFUSED_WITH_A_GATE.get(family) if spec != "never" else None)
    if reason is None:
        agree(family, spec, "generic")
        return
    with pytest.raises(InputError, match=reason) as refusal:
        agree(family, spec, "generic")
    assert family in REFUSED_WITH_A_GATE or "--engine eager" in (refusal.value.hint or "")


@pytest.mark.parametrize("spec", ["never", "always:1"])
@pytest.mark.parametrize("family", FUSED)
def test_standard_families_run_fused(family, spec):
    agree(family, spec, "fused", **STANDARD)


def test_a_family_whose_layers_do_not_all_rotate_is_not_standard():
    agree("smollm3", "always:1", "fused", **STANDARD)
    agree("smollm3", "always:1", "generic", **STANDARD, num_hidden_layers=4)  # every fourth does not


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing can be captured here")
@pytest.mark.parametrize("spec", ["never", "always:1"])
@pytest.mark.parametrize("family", FAMILIES)
def test_captured_tokens_are_those_of_eager_or_the_family_is_refused(family, spec):
    model = copy.deepcopy(build(family)).to("cuda", torch.bfloat16 if family in EXPERTS else torch.float32)
    reason = REFUSED_CAPTURED.get(family) or (REFUSED_WITH_A_GATE.get(family) if spec != "never" else None)
    loaded = adopt_model(model, tiny_tokenizer(), family)
    ids = torch.randint(3, 97, (1, 10), generator=torch.Generator().manual_seed(1)).cuda()
    if reason is None:
        found, _ = graph(loaded, ids, spec, capture=True)
        assert found.tolist() == eager(model, ids, spec).tolist()
        return
    with pytest.raises(InputError, match=reason) as refusal:
        graph(loaded, ids, spec, capture=True)
    assert family in REFUSED_WITH_A_GATE or "--engine eager" in (refusal.value.hint or "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing can be captured here")
def test_experts_in_float32_are_refused_with_what_to_do():
    loaded = adopt_model(copy.deepcopy(build("mixtral")).cuda(), tiny_tokenizer(), "mixtral")
    with pytest.raises(InputError, match="needs the host") as refusal:
        graph(loaded, torch.ones(1, 10, dtype=torch.long, device="cuda"), "never", capture=True)
    assert "bfloat16" in (refusal.value.hint or "")
