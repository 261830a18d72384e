"""Adapters: one batch holds requests of two, and what each adds goes to its own rows, whoever of them skips.

Reference: the adapter added to the weights, under the Hugging Face runtime with the same gate. (Requests without an adapter
get batches of their own here: vLLM 0.32 on the CPU hands them the last adapter if they share a step with adapted ones.)
"""

from __future__ import annotations

import pytest
from adapters import save_adapter
from conftest import save_tiny
from test_vllm_same_as_hf import assert_same
from vllm_helpers import PROMPTS, SIZE, Engine, hugging_face, save_gates, save_probes

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


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
