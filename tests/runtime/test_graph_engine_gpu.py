"""The graph engine captured on a GPU: tokens of the eager runtime, flags decided on the device, no wait within a step."""

from __future__ import annotations

import pytest
import torch
from conftest import save_tiny, words

from sedac_cli.config import ModelSpec
from sedac_cli.errors import InputError
from sedac_cli.gates.base import Guards
from sedac_cli.gates.cascade import CascadeGate
from sedac_cli.gates.entropy import EntropyGate
from sedac_cli.gates.learned import LearnedGate, Router
from sedac_cli.gates.lens import HeadLens
from sedac_cli.gates.stability import StabilityGate
from sedac_cli.gpu import skinny
from sedac_cli.models import load_model
from sedac_cli.probes import LREProbe
from sedac_cli.runtime.generate import GenerateOptions, generate
from sedac_cli.runtime.graph import GraphEngine
from sedac_cli.runtime.plan import Plan, make_plan
from sedac_cli.standins import ZeroStandIn
from sedac_cli.standins.lowrank import LowRank, LowRankStandIns

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing can be captured here"),
]
SHAPE = {"hidden_size": 64, "max_position_embeddings": 256}
PROMPTS = [words(3 + 2 * (i % 12), i) for i in range(40)]
BATCHES = [1, 8, 12, 40]
"""One sequence, kernels for few rows, kernels for a batch; where no Hopper is, the last is cuBLAS with conditional nodes."""
OPTIONS = GenerateOptions(max_new_tokens=30, ignore_eos=True)


def load(folder, dtype="bfloat16"):
    return load_model(ModelSpec(ref=str(folder), device="cuda", dtype=dtype))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"), **SHAPE)


@pytest.fixture(scope="module")
def half(folder):
    return load(folder)


@pytest.fixture(scope="module")
def single(folder):
    return load(folder, "float32")


@pytest.fixture(scope="module")
def trained():
    return {dtype: load("builtin:tiny", dtype) for dtype in ("bfloat16", "float32")}


@pytest.fixture(params=["this chip", "another"])
def chip(request, monkeypatch):
    """The other: without Hopper's kernels, as on any other chip."""
    if request.param == "another":
        monkeypatch.setattr(skinny, "has_hopper_products", lambda device: False)


def tokens(result):
    return [[t.token for t in row] for row in result.tokens]


def engine_of(loaded, plan="never", batch=1, **options):
    plan = make_plan(plan, loaded.decoder, loaded.identity) if isinstance(plan, str) else plan
    return GraphEngine(loaded, plan, batch=batch, max_length=240, **options)


def plans(loaded) -> dict[str, Plan]:
    """Every kind of program; thresholds in the middle of what random weights give, so that both ways are taken."""
    torch.manual_seed(5)
    layers, width = loaded.decoder.num_layers, loaded.decoder.hidden_size
    routers = {l: Router(width, 16).requires_grad_(False) for l in range(layers)}  # noqa: E741
    for router in routers.values():
        torch.nn.init.normal_(router.weight, 0, 0.3)
        torch.nn.init.normal_(router.inner, 0, 0.1)
        torch.nn.init.normal_(router.outer, 0, 0.3)
    standins = {l: LowRank(width, 12).requires_grad_(False) for l in range(1, layers)}  # noqa: E741
    for standin in standins.values():
        for p in standin.parameters():
            torch.nn.init.normal_(p, 0, 0.1)
    probes = {1: LREProbe(width, 8).requires_grad_(False), 2: LREProbe(width, 8).requires_grad_(False)}
    return {
        "learned": Plan(LearnedGate(layers, routers, 0.0, Guards(sinks=2)), LowRankStandIns(standins)),
        "cascade": Plan(CascadeGate(layers, probes, {1: 0.7, 2: 0.8}), LowRankStandIns(standins)),
        "stability": Plan(StabilityGate(layers, tau=0.5, k=1, min_layer=1), ZeroStandIn()),
        "always": make_plan("always:2", loaded.decoder),
        "entropy": Plan(
            EntropyGate(layers, HeadLens(loaded.decoder), 6.2, 0.5, 0.25, 0, 1, guards=Guards(sinks=2)), ZeroStandIn()
        ),
    }


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("batch", BATCHES)
def test_all_on_is_bit_identical_to_the_ungated_graph(half, batch, fused, chip):
    plain, gated = engine_of(half, batch=batch, fused=fused), engine_of(half, batch=batch, forced=True, fused=fused)
    if fused is None:
        assert (gated.path, gated.step.ops.stops) == ("fused", batch <= skinny.fast_rows(torch.device("cuda")))
    gated.program.needs.fill_(1)
    assert tokens(plain.generate(PROMPTS[:batch], OPTIONS)) == tokens(gated.generate(PROMPTS[:batch], OPTIONS))
    assert torch.equal(plain.cache.layers[-1][0], gated.cache.layers[-1][0])


@pytest.mark.parametrize(
    "family", ["qwen2", "qwen3", "llama", "gpt2", "gemma2", "olmo2", "opt", "phi3", "stablelm", "granite"]
)
def test_float32_tokens_are_those_of_eager(tmp_path, family):
    extra = {
        "gpt2": {"n_inner": 64, "n_embd": 64, "n_head": 4, "n_layer": 4, "n_positions": 256},
        "opt": {"ffn_dim": 64, "word_embed_proj_dim": 64}, "gemma2": {"head_dim": 16, "sliding_window": 250},
    }.get(family, {})  # fmt: skip
    loaded = load(save_tiny(tmp_path, family, **SHAPE | extra), "float32")
    for spec in ("never", "always:2"):
        plan = make_plan(spec, loaded.decoder)
        expected = generate(loaded, plan.gate, PROMPTS[:1], OPTIONS)
        found = engine_of(loaded, spec).generate(PROMPTS[:1], OPTIONS)
        assert tokens(found) == tokens(expected), spec
        assert found.skip_ratio == pytest.approx(expected.skip_ratio)


def test_the_trained_model_in_both_precisions(trained):
    prompts = ["It was a bright morning and", "The captain of the ship said that", "She had never seen", "In the year"]
    for dtype, least in (("float32", 1.0), ("bfloat16", 0.9)):
        loaded = trained[dtype]
        engine, same, total = engine_of(loaded), 0, 0
        assert engine.path == ("fused" if dtype == "bfloat16" else "generic")
        for prompt in prompts:
            expected = tokens(generate(loaded, make_plan("never", loaded.decoder).gate, [prompt], OPTIONS))[0]
            found = tokens(engine.generate([prompt], OPTIONS))[0]
            total += len(found)
            # After the first token that differs, the two are on other texts: they are compared up to it.
            same += next((i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b), len(found))
        assert same >= least * total, f"{dtype}: {same} of {total}"


@pytest.mark.parametrize("name", ["learned", "cascade", "stability", "always", "entropy"])
def test_gates_decide_on_the_device_what_they_decide_in_eager(single, name):
    plan = plans(single)[name]
    expected = generate(single, plan.gate, PROMPTS[3:4], OPTIONS, plan.standin)
    found = engine_of(single, plan).generate(PROMPTS[3:4], OPTIONS)
    assert tokens(found) == tokens(expected)
    assert [t.skipped for t in found.tokens[0]] == [t.skipped for t in expected.tokens[0]]
    assert 0 < found.skip_ratio_decode < 1


@pytest.mark.parametrize("batch", [1, 12, 40])
@pytest.mark.parametrize("name", ["learned", "cascade", "stability", "always", "entropy"])
def test_fused_and_generic_paths_skip_alike(half, name, batch, chip):
    """In bf16 the two round differently, so a score near its limit may fall on the other side."""
    prompts = PROMPTS[:batch]
    ways = [engine_of(half, plans(half)[name], batch=batch, fused=way) for way in (True, False)]
    found = [engine.generate(prompts, OPTIONS) for engine in ways]
    assert abs(found[0].skip_ratio_decode - found[1].skip_ratio_decode) < 0.1
    same = sum(a == b for x, y in zip(*map(tokens, found), strict=True) for a, b in zip(x, y, strict=True))
    assert same > 0


def test_random_masks_agree_with_the_eager_reference(half):
    """One step per mask, logits against the model run layer by layer in float32 with the same MLPs left out."""
    engine = engine_of(half, forced=True, burst=1)
    reference = load(half.identity.ref, "float32")
    ids = half.tokenizer(PROMPTS[:1], return_tensors="pt")["input_ids"].cuda()
    for seed in range(8):
        flags = torch.rand(engine.program.num_layers, generator=torch.Generator().manual_seed(seed)) < 0.5
        _, prompt, _ = engine._prompt(ids[:, :-1], torch.ones_like(ids[:, :-1]), gated=False)
        engine._load(ids[:, :-1], torch.ones_like(ids[:, :-1]), prompt, ids[:, -1])
        engine.program.needs.copy_(flags)
        with torch.inference_mode():
            found = engine.step(engine.state)[0].float()
            cache = reference.model(input_ids=ids[:, :-1], use_cache=True).past_key_values
            zeroed = [b.entry.register_forward_hook(lambda m, a, y: torch.zeros_like(y))
                      for b, on in zip(reference.decoder.branches, flags, strict=True) if not on]  # fmt: skip
            expected = reference.model(input_ids=ids[:, -1:], past_key_values=cache).logits[0, -1]
            for hook in zeroed:
                hook.remove()
        assert float((found - expected).norm() / expected.norm()) < 0.04


@pytest.mark.parametrize("spec", ["never", "always:2"])
def test_each_of_a_batch_ends_where_eager_ends_it(single, monkeypatch, spec):
    """Prompts of several lengths, two tokens that end a text."""
    free = tokens(engine_of(single, spec, batch=4).generate(PROMPTS[:4], OPTIONS))
    monkeypatch.setattr(single.model.generation_config, "eos_token_id", [free[0][2], free[1][12]])
    engine, options = engine_of(single, spec, batch=4), GenerateOptions(max_new_tokens=30)
    found = tokens(engine.generate(PROMPTS[:4], options))
    plan = make_plan(spec, single.decoder)
    for index, (row, whole) in enumerate(zip(found, free, strict=True)):
        assert row == tokens(generate(single, plan.gate, PROMPTS[index : index + 1], options))[0]
        assert row == whole[: len(row)]
        # The device knew of the end, and not only who read its tokens.
        assert set(engine.last.tokens[len(row) - 1 :, index].tolist()) <= {single.tokenizer.pad_token_id}
    assert len(found[0]) <= 3
    assert len({len(row) for row in found}) > 1


@pytest.mark.parametrize("batch", [1, 8, 40])
@pytest.mark.parametrize("spec", ["never", "always:2"])
def test_a_penalty_of_repetitions_is_eagers(single, monkeypatch, batch, spec):
    """Two calls of one engine: what the first has seen is forgotten."""
    plain = tokens(engine_of(single, spec, batch=batch).generate(PROMPTS[:batch], OPTIONS))
    monkeypatch.setattr(single.model.generation_config, "repetition_penalty", 1.3)
    plan, engine = make_plan(spec, single.decoder), engine_of(single, spec, batch=batch)
    expected = [tokens(generate(single, plan.gate, [prompt], OPTIONS))[0] for prompt in PROMPTS[:batch]]
    for _ in range(2):
        assert tokens(engine.generate(PROMPTS[:batch], OPTIONS)) == expected
    assert expected != plain


def test_a_penalty_in_the_kernels_path(half, monkeypatch):
    monkeypatch.setattr(half.model.generation_config, "repetition_penalty", 4.0)
    engine = engine_of(half, batch=3)
    assert engine.path == "fused"
    for row in tokens(engine.generate(PROMPTS[:3], OPTIONS)):
        assert len(set(row)) > 0.9 * len(row), row  # random weights repeat themselves without one
    drawn = GenerateOptions(max_new_tokens=30, temperature=0.7, seed=1, ignore_eos=True)
    assert tokens(engine.generate(PROMPTS[:3], drawn)) == tokens(engine.generate(PROMPTS[:3], drawn))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device: there is no other to be current")
@pytest.mark.parametrize(("dtype", "batch"), [("bfloat16", 1), ("bfloat16", 12), ("bfloat16", 40), ("float32", 2)])
def test_another_device_than_the_current_one(folder, dtype, batch):
    here, there = (load_model(ModelSpec(ref=str(folder), device=f"cuda:{index}", dtype=dtype)) for index in range(2))
    for name in ("always", "learned"):
        made = [engine_of(loaded, plans(loaded)[name], batch=batch) for loaded in (here, there)]
        first, second = (engine.generate(PROMPTS[:batch], OPTIONS) for engine in made)
        assert torch.cuda.current_device() == 0
        assert tokens(first) == tokens(second)
        assert [[t.skipped for t in row] for row in first.tokens] == [[t.skipped for t in row] for row in second.tokens]
        assert len({t for row in tokens(second) for t in row}) > 3, "the same few tokens: nothing was replayed"


def test_sampling_differs_by_seed_and_repeats_by_seed(half):
    engine = engine_of(half)

    def draw(seed):
        options = GenerateOptions(max_new_tokens=40, temperature=1.0, top_p=0.95, seed=seed, ignore_eos=True)
        return tokens(engine.generate(PROMPTS[:1], options))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_settings_are_read_by_the_captured_graph(single):
    engine, texts = engine_of(single), {}
    for temperature in (1e-3, 1.0, 5.0):
        options = GenerateOptions(max_new_tokens=30, temperature=temperature, top_p=0.95, seed=3, ignore_eos=True)
        texts[temperature] = tokens(engine.generate(PROMPTS[:1], options))
    made = len(engine.graphs)
    assert made == 2  # of eight steps and of one
    assert len({str(text) for text in texts.values()}) == 3
    assert texts[1e-3] == tokens(engine.generate(PROMPTS[:1], OPTIONS))
    assert len(engine.graphs) == 2 * made


def test_no_wait_within_a_burst(half):
    """CUDA itself is told to object to synchronising calls while bursts run."""
    engine = engine_of(half, plans(half)["learned"])
    engine.generate(PROMPTS[:1], OPTIONS)
    replay, _ = engine.graphs[next(iter(engine.graphs))]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_cannot_be_captured_is_said(tmp_path):
    config = {"num_local_experts": 4, "num_experts_per_tok": 2}
    loaded = load(save_tiny(tmp_path, "mixtral", **SHAPE, **config))
    try:
        found = engine_of(loaded, "always:2").generate(PROMPTS[:1], OPTIONS)
    except InputError as error:
        assert error.hint is not None and "eager" in error.hint  # noqa: PT017, PT018 - either way is right, silence is not
    else:
        plan = make_plan("always:2", loaded.decoder)
        assert tokens(found) == tokens(generate(loaded, plan.gate, PROMPTS[:1], OPTIONS))


def test_fewer_host_calls_than_tokens(half):
    engine = engine_of(half)
    ids = half.tokenizer(PROMPTS[:1], return_tensors="pt")["input_ids"].cuda()
    done = engine.run(ids, torch.ones_like(ids), GenerateOptions(max_new_tokens=65, ignore_eos=True))
    assert done.steps == 64
    assert done.replays == 8
