"""The graph engine's steps, run one by one on a CPU by the kernels' twins: they must be what the eager runtime generates."""

from __future__ import annotations

import pytest
import torch
from conftest import save_tiny, words

from sedac_cli.errors import InputError
from sedac_cli.models import load_model
from sedac_cli.runtime.generate import GenerateOptions, generate
from sedac_cli.runtime.graph import GraphEngine
from sedac_cli.runtime.graph.generic import GenericStep
from sedac_cli.runtime.graph.sampling import shaped
from sedac_cli.runtime.plan import Plan, make_plan

PROMPTS = ["the old king", "an", "the sea was in her and the wind ran to a grey hill"]
SHAPE = {"hidden_size": 64, "max_position_embeddings": 256}
"""Heads of 16: the smallest that the attention kernel takes."""
FAMILIES = {
    "qwen2": {}, "qwen3": {"head_dim": 32}, "llama": {}, "mistral": {"sliding_window": None}, "phi3": {},
    "granite": {"residual_multiplier": 0.5}, "gemma2": {"head_dim": 16, "sliding_window": 128}, "olmo2": {},
    "gpt2": {"n_inner": 64, "n_embd": 64, "n_head": 4, "n_layer": 4, "n_positions": 256}, "opt": {"ffn_dim": 64, "word_embed_proj_dim": 64},
    "gpt_neox": {}, "stablelm": {}, "gemma": {"head_dim": 16},
}  # fmt: skip
FUSED = {"qwen2", "qwen3", "llama", "mistral", "phi3", "gemma"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load_model(str(save_tiny(tmp_path_factory.mktemp("tiny"), **SHAPE)))


def engine_of(loaded, spec="never", batch=1, **options) -> GraphEngine:
    plan = make_plan(spec, loaded.decoder, loaded.identity) if isinstance(spec, str) else spec
    return GraphEngine(loaded, plan, batch=batch, max_length=120, capture=False, **options)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    loaded = load_model(str(save_tiny(folder, request.param, **SHAPE | FAMILIES[request.param])))
    return request.param, loaded


def test_every_family_generates_what_eager_generates(family):
    name, loaded = family
    engine = engine_of(loaded, batch=3)
    assert engine.path == ("fused" if name in FUSED else "generic"), engine.notes
    options = GenerateOptions(max_new_tokens=20)
    expected = generate(loaded, make_plan("never", loaded.decoder).gate, PROMPTS, options)
    found = engine.generate(PROMPTS, options)
    assert [[t.token for t in row] for row in found.tokens] == [[t.token for t in row] for row in expected.tokens]
    assert found.texts == expected.texts
    assert found.skip_ratio == 0


@pytest.mark.parametrize("spec", ["always:2", "always:0"])
def test_every_family_skips_what_eager_skips(family, spec):
    _, loaded = family
    options = GenerateOptions(max_new_tokens=12, ignore_eos=True)
    plan = make_plan(spec, loaded.decoder)
    expected = generate(loaded, plan.gate, PROMPTS[:1], options)
    found = engine_of(loaded, spec).generate(PROMPTS[:1], options)
    assert [t.token for t in found.tokens[0]] == [t.token for t in expected.tokens[0]]
    assert found.skip_ratio == pytest.approx(expected.skip_ratio)
    assert [t.exit_layer for t in found.tokens[0]] == [t.exit_layer for t in expected.tokens[0]]


def test_a_lens_through_the_output_head_decides_what_it_decides_in_eager(tiny):
    spec = "entropy:mean=6.2,sd=0.5,threshold=0.25,anchor_interval=0,min_exit_layer=1,sinks=2,first=0,last=0"
    options = GenerateOptions(max_new_tokens=30, ignore_eos=True)
    expected = generate(tiny, make_plan(spec, tiny.decoder).gate, PROMPTS[2:], options)
    found = engine_of(tiny, spec).generate(PROMPTS[2:], options)
    assert [(t.token, t.skipped) for t in found.tokens[0]] == [(t.token, t.skipped) for t in expected.tokens[0]]
    assert 0 < found.skip_ratio_decode < 1


def test_both_paths_agree(tiny):
    options = GenerateOptions(max_new_tokens=16, ignore_eos=True)
    fused, generic = (engine_of(tiny, "always:2", batch=2, fused=way) for way in (True, False))
    assert isinstance(generic.step, GenericStep)
    assert fused.generate(PROMPTS[:2], options).texts == generic.generate(PROMPTS[:2], options).texts


def test_flags_of_the_caller_decide(tiny):
    """Forced flags: each layer's MLP really hangs on its own flag."""
    engine = engine_of(tiny, forced=True)
    options = GenerateOptions(max_new_tokens=9, ignore_eos=True)
    engine.program.needs.copy_(torch.tensor([1, 0, 1, 0]))
    found = engine.generate(PROMPTS[:1], options)
    assert [t.skipped for t in found.tokens[0]] == [0] + [2] * 8
    assert found.tokens[0][3].exit_layer == 1


def test_a_row_that_needs_the_mlp_gives_it_to_all(tiny):
    """Sinks keep the short row running while the long one would skip: nobody skips until both may."""
    from sedac_cli.gates.base import Guards

    guards = Guards(sinks=8)
    plan = make_plan("always:1", tiny.decoder, guards=guards)
    options = GenerateOptions(max_new_tokens=12, ignore_eos=True)
    short, long = "a", words(12)
    alone = engine_of(tiny, plan).generate([long], options)
    both = engine_of(tiny, plan, batch=2).generate([short, long], options)
    assert all(t.skipped == 3 for t in alone.tokens[0][1:])
    counts = [t.skipped for t in both.tokens[1][1:]]
    assert counts[0] == 0
    assert counts[-1] == 3
    assert counts == [t.skipped for t in both.tokens[0][1:]]


def test_fewer_prompts_than_rows_and_an_early_end(tiny):
    options = GenerateOptions(max_new_tokens=30)
    wide, exact = engine_of(tiny, batch=4), engine_of(tiny, batch=2)
    assert wide.generate(PROMPTS[:2], options).texts == exact.generate(PROMPTS[:2], options).texts
    first = exact.generate(PROMPTS[:2], options)
    again = exact.generate(PROMPTS[:2], options)
    assert first.texts == again.texts  # nothing of the call before is left


def test_tokens_come_as_they_are_made_and_can_be_stopped(tiny):
    engine = engine_of(tiny, burst=4)
    seen: list[int] = []
    options = GenerateOptions(max_new_tokens=24, ignore_eos=True)
    whole = engine.generate(PROMPTS[:1], options, on_tokens=lambda ids: seen.extend(ids[:, 0].tolist()))
    assert seen == [t.token for t in whole.tokens[0]]
    stopped = engine.generate(PROMPTS[:1], options, on_tokens=lambda ids: True)
    assert stopped.new_tokens < 24


def test_what_does_not_fit_is_said(tiny):
    engine = engine_of(tiny)
    with pytest.raises(InputError, match="exceed the 120 places"):
        engine.generate(["the sea " * 25], GenerateOptions(max_new_tokens=40))
    with pytest.raises(InputError, match="2 prompts at once"):
        engine.generate(PROMPTS[:2], GenerateOptions(max_new_tokens=4))
    with pytest.raises(InputError, match="needs a CUDA GPU"):
        GraphEngine(tiny, make_plan("never", tiny.decoder))


def test_positions_counted_in_a_way_of_its_own_are_refused(tmp_path):
    loaded = load_model(str(save_tiny(tmp_path, "bloom", n_layer=4, n_head=4)))
    with pytest.raises(InputError, match=r"Bloom.*cache of fixed size"):
        engine_of(loaded)


def test_a_window_shorter_than_the_cache_is_refused_by_the_generic_path(tmp_path):
    loaded = load_model(str(save_tiny(tmp_path, "gemma2", head_dim=16, sliding_window=16, **SHAPE)))
    with pytest.raises(InputError, match="window of 16"):
        engine_of(loaded)


def test_a_window_in_the_fused_path_is_the_models_own(tmp_path):
    loaded = load_model(str(save_tiny(tmp_path, "mistral", sliding_window=12, **SHAPE)))
    engine = engine_of(loaded)
    assert engine.path == "fused"
    options = GenerateOptions(max_new_tokens=30, ignore_eos=True)
    expected = generate(loaded, make_plan("never", loaded.decoder).gate, [words(10)], options)
    assert engine.generate([words(10)], options).texts == expected.texts


def test_experts_run_under_a_flag(tmp_path):
    config = {"num_local_experts": 4, "num_experts_per_tok": 2}
    loaded = load_model(str(save_tiny(tmp_path, "mixtral", **SHAPE, **config)))
    assert engine_of(loaded).path == "generic"
    found = engine_of(loaded, "always:2").generate(PROMPTS[:1], GenerateOptions(max_new_tokens=6, ignore_eos=True))
    plan = make_plan("always:2", loaded.decoder)
    expected = generate(loaded, plan.gate, PROMPTS[:1], GenerateOptions(max_new_tokens=6, ignore_eos=True))
    assert found.texts == expected.texts


def test_sampling_draws_from_the_shaped_distribution(tiny):
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0]])
    half, cut = torch.tensor([0.5]), torch.tensor([0.9])
    probabilities = shaped(logits, half, cut, top_k=3)
    exact = torch.softmax(logits / 0.5, -1)
    assert probabilities[0, 3:].sum() == 0
    assert probabilities[0, 0] / probabilities[0, 1] == pytest.approx(float(exact[0, 0] / exact[0, 1]), rel=1e-5)
    assert (shaped(logits, 2 * half, None, 0) - torch.softmax(logits, -1)).abs().max() < 1e-6
    engine = engine_of(tiny)
    options = GenerateOptions(max_new_tokens=16, temperature=1.0, seed=3, ignore_eos=True)
    assert engine.generate(PROMPTS[:1], options).texts == engine.generate(PROMPTS[:1], options).texts
    other = GenerateOptions(max_new_tokens=16, temperature=1.0, seed=4, ignore_eos=True)
    assert engine.generate(PROMPTS[:1], options).texts != engine.generate(PROMPTS[:1], other).texts


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_settings_are_read_by_the_graph_that_is_there(tiny, top_p):
    engine, texts = engine_of(tiny), {}

    def drawn(temperature, top_p=top_p, **more):
        options = GenerateOptions(
            max_new_tokens=16, temperature=temperature, top_p=top_p, seed=3, ignore_eos=True, **more
        )
        return engine.generate(PROMPTS[:1], options).texts

    for temperature in (1e-3, 1.0, 5.0):
        texts[temperature] = drawn(temperature)
    made = len(engine.graphs)
    assert made == 2  # of eight steps and of one
    assert len({str(text) for text in texts.values()}) == 3
    assert drawn(1.0) == texts[1.0]
    assert drawn(1e-3) == engine.generate(PROMPTS[:1], GenerateOptions(max_new_tokens=16, ignore_eos=True)).texts
    assert len(engine.graphs) == 2 * made
    if top_p < 1:
        assert drawn(5.0, top_p=1e-6) == texts[1e-3]
        assert len(engine.graphs) == 2 * made


def test_a_gate_of_another_model_object_is_not_confused(tiny):
    plan = Plan(make_plan("random:0.5", tiny.decoder, seed=1).gate, make_plan("never", tiny.decoder).standin)
    found = engine_of(tiny, plan).generate(PROMPTS[:1], GenerateOptions(max_new_tokens=40, ignore_eos=True))
    assert 0.3 < found.skip_ratio_decode < 0.7
