"""Adapters: one batch holds requests of two, and what each adds goes to its own rows, whoever of them skips.

Reference: the adapter added to the weights, under the Hugging Face runtime with the same gate. (Requests without an adapter
get batches of their own here: vLLM 0.32 on the CPU hands them the last adapter if they share a step with adapted ones.)
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import save_tiny
from safetensors.torch import load_file, save_file
from test_vllm_same_as_hf import assert_same
from vllm_helpers import PROMPTS, SIZE, Engine, hugging_face, save_gates, save_probes

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

RANK, ALPHA = 4, 8
TARGETS = {"q_proj": "self_attn", "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp"}


def save_adapter(base, adapter, merged, seed: int) -> None:
    """A random adapter as peft writes it, and the model that has it added to its weights."""
    generator = torch.Generator().manual_seed(seed)
    weights, parts = load_file(base / "model.safetensors"), {}
    for layer in range(4):
        for name, block in TARGETS.items():
            path = f"model.layers.{layer}.{block}.{name}"
            weight = weights[path + ".weight"]
            a = torch.randn(RANK, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
            b = torch.randn(weight.shape[0], RANK, generator=generator) * 0.3
            parts |= {f"base_model.model.{path}.lora_A.weight": a, f"base_model.model.{path}.lora_B.weight": b}
            weights[path + ".weight"] = weight + ALPHA / RANK * b @ a
    adapter.mkdir()
    save_file(parts, adapter / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(TARGETS),
        "bias": "none", "base_model_name_or_path": str(base),
    }  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    shutil.copytree(base, merged)
    save_file(weights, merged / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """(vLLM, the requests for two adapters, the model under Hugging Face: plain, and with each of them)."""
    from vllm.lora.request import LoRARequest

    from sedac_cli.models import load_model

    folder = tmp_path_factory.mktemp("lora")
    base = save_tiny(folder / "base", "qwen2", **SIZE)
    for seed in (1, 2):
        save_adapter(base, folder / f"adapter{seed}", folder / f"merged{seed}", seed)
    models = [load_model(str(path)) for path in (base, folder / "merged1", folder / "merged2")]
    engine = Engine(base, enable_lora=True, max_lora_rank=8, max_loras=2)
    yield engine, [LoRARequest(f"adapter{n}", n, str(folder / f"adapter{n}")) for n in (1, 2)], models
    engine.close()


def compare(adapted, spec=None, **settings):
    from sedac_cli.vllm.plan import ModelShape, build_plan

    engine, adapters, models = adapted
    session = engine.gate(spec, **settings)
    prompts = [prompt for prompt in PROMPTS for _ in adapters]
    new, logprobs = engine.run(prompts, lora=adapters * len(PROMPTS))
    alone = engine.run()
    plan = build_plan(session.settings, ModelShape.of(engine.worker.model_config))
    theirs = [hugging_face(model, plan) for model in models]
    assert_same(alone, theirs[0])
    for n in (0, 1):
        assert_same((new[n::2], logprobs[n::2]), theirs[1 + n])
    skipped = [sum(counts) for counts in zip(*(run.skipped_per_layer for _, _, run in theirs), strict=True)]
    assert session.counters.skipped.tolist() == skipped
    return session


def test_never_is_plain_and_adapters_speak(adapted):
    engine, adapters, _ = adapted
    engine.gate(None)
    wants = [None, [adapters[0]] * 3, adapters + adapters[:1]]
    plain = [engine.run(lora=lora) for lora in wants]
    assert plain[0][0] != plain[1][0] != plain[2][0]
    engine.gate("never")
    assert [engine.run(lora=lora) for lora in wants] == plain


def test_forced(adapted):
    compare(adapted, "forced:1/3")


def test_cascade(adapted, tmp_path):
    limits = save_probes(tmp_path, adapted[2][0], PROMPTS, layers=(1, 2), share=0.4)
    session = compare(adapted, probe_dir=str(tmp_path), probe_layers=[1, 2], adaptive=False, thresholds=limits)
    assert 0.02 < session.status()["skip_ratio"] < 0.9


def test_learned_with_standins(adapted, tmp_path):
    save_gates(tmp_path / "gates.pth", adapted[2][0])
    session = compare(adapted, f"learned:{tmp_path}/gates.pth@0.4")
    assert 0.05 < session.status()["skip_ratio"] < 0.95
