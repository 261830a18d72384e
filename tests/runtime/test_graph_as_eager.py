"""What a model's settings, a gate or a stand-in bring of their own: the graph engine does with it what eager does, or refuses."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conftest import VOCABULARY, save_tiny, tiny_tokenizer, words
from families import build

from sedac_cli.config import ModelSpec
from sedac_cli.errors import InputError
from sedac_cli.gates.adaptive import AdaptiveThresholds
from sedac_cli.gates.base import Guards
from sedac_cli.gates.cascade import CascadeGate
from sedac_cli.gates.learned import LearnedGate, Router
from sedac_cli.gates.simple import AlwaysGate
from sedac_cli.gates.soft import SoftGate
from sedac_cli.models import adopt_model, load_model
from sedac_cli.probes import LREProbe
from sedac_cli.runtime import graph
from sedac_cli.runtime.engines import Generator
from sedac_cli.runtime.generate import GenerateOptions, generate
from sedac_cli.runtime.graph import GraphEngine
from sedac_cli.runtime.graph import engine as engine_module
from sedac_cli.runtime.graph.sampling import repeated, shaped
from sedac_cli.runtime.graph.standard import _norm
from sedac_cli.runtime.graph.stream import GraphStream
from sedac_cli.runtime.plan import Plan, make_plan
from sedac_cli.runtime.stream import Row, stream
from sedac_cli.standins import ZeroStandIn
from sedac_cli.standins.lowrank import LowRank, LowRankStandIns

SHAPE = {"hidden_size": 64, "max_position_embeddings": 256}
OPTIONS = GenerateOptions(max_new_tokens=16, ignore_eos=True)
PROMPTS = ["the old king", "an", "the sea was in her and the wind ran to a grey hill"]


def loaded_of(folder, family="qwen2", dtype="float32", change=None, **config):
    return load_model(ModelSpec(ref=str(save_tiny(folder, family, change=change, **SHAPE | config)), dtype=dtype))


@pytest.fixture
def tiny(tmp_path):
    return loaded_of(tmp_path / "tiny")


def engine_of(loaded, plan="never", batch=1, **options):
    plan = make_plan(plan, loaded.decoder) if isinstance(plan, str) else plan
    return GraphEngine(loaded, plan, batch=batch, max_length=120, capture=False, **options)


def told(result):
    return [[(t.token, t.skipped) for t in row] for row in result.tokens]


def as_eager(loaded, plan, prompt=PROMPTS[2], **options):
    expected = generate(loaded, plan.gate, [prompt], OPTIONS, plan.standin)
    return told(engine_of(loaded, plan, **options).generate([prompt], OPTIONS)) == told(expected)


def random_weights(module, scale=0.3, seed=0):
    torch.manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(0, scale)
    return module.eval().requires_grad_(False)


# A model's own generation settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_a_penalty_of_repetitions_is_eagers(tiny, penalty):
    plain = [[t.token for t in row] for row in engine_of(tiny, batch=3).generate(PROMPTS, OPTIONS).tokens]
    tiny.model.generation_config.repetition_penalty = penalty
    gate = make_plan("never", tiny.decoder).gate
    # Each alone: an older transformers (5.17) takes a batch's padding for something that was said.
    expected = [told(generate(tiny, gate, [prompt], OPTIONS))[0] for prompt in PROMPTS]
    engine = engine_of(tiny, batch=4)
    for _ in range(2):  # what a call has seen is forgotten by the next
        found = engine.generate(PROMPTS, OPTIONS)
        assert told(found) == expected
    assert [[t.token for t in row] for row in found.tokens] != plain
    tiny.model.generation_config.repetition_penalty = 1.0
    assert [[t.token for t in row] for row in engine.generate(PROMPTS, OPTIONS).tokens] == plain


def test_a_penalty_is_the_streams_too(tiny):
    tiny.model.generation_config.repetition_penalty = 1.5
    row = Row(tuple(tiny.tokenizer(PROMPTS[0])["input_ids"]), max_new_tokens=24, ignore_eos=True)
    plan = make_plan("always:2", tiny.decoder)

    def heard(run):
        found = []
        run([row], lambda t: found.append((t.token, t.skipped, round(t.entropy, 3))) or True, lambda i, c: None)
        return found

    assert heard(GraphStream(tiny, plan, 100, capture=False)) == heard(lambda *a: stream(tiny, plan, *a))


def test_scores_of_what_was_seen_are_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    torch.manual_seed(0)
    logits, ids = torch.randn(3, 50), torch.randint(0, 50, (3, 20))
    seen = torch.zeros(3, 50, dtype=torch.bool).scatter_(1, ids, True)
    for penalty in (0.7, 1.4):
        wanted = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
        assert torch.equal(repeated(logits, seen, torch.tensor([penalty])), wanted)


@pytest.mark.parametrize(
    ("name", "value"),
    [("no_repeat_ngram_size", 2), ("suppress_tokens", [5]), ("bad_words_ids", [[7]]), ("min_new_tokens", 9)],
)
def test_other_settings_are_refused_and_auto_runs_eager(tiny, monkeypatch, name, value):
    monkeypatch.setattr(graph, "GraphEngine", partial(GraphEngine, capture=False))
    setattr(tiny.model.generation_config, name, value)
    plan = make_plan("never", tiny.decoder)
    with pytest.raises(InputError, match=f"hold {name} = .*which the graph engine does not apply"):
        engine_of(tiny).generate(PROMPTS[:1], OPTIONS)
    texts = Generator("auto", tiny, plan)
    texts.eager = False
    found, used = texts(PROMPTS[:1], OPTIONS)
    assert used.name == "eager"
    assert name in used.notes[0]
    assert told(found) == told(generate(tiny, plan.gate, PROMPTS[:1], OPTIONS))


def test_the_best_token_stays_whatever_top_p():
    scores = torch.tensor([[1.0, 3.0, 2.0]])
    assert shaped(scores, torch.ones(1), torch.zeros(1), 0).tolist() == [[0.0, 1.0, 0.0]]


def test_who_stops_at_the_first_token_gets_no_other(tiny):
    heard = []
    made = engine_of(tiny).generate(PROMPTS[:1], OPTIONS, on_tokens=lambda t: heard.append(t.shape[0]) or True)
    assert (heard, made.new_tokens) == ([1], 1)


@pytest.mark.parametrize("prompt", ["sea king grey a a and", *PROMPTS])
def test_the_only_token_of_a_first_call_is_penalised_too(tiny, prompt):
    options = GenerateOptions(max_new_tokens=1, ignore_eos=True)
    for penalty in (1.3, 5.0):
        tiny.model.generation_config.repetition_penalty = penalty
        expected = generate(tiny, make_plan("never", tiny.decoder).gate, [prompt], options)
        assert told(engine_of(tiny).generate([prompt], options)) == told(expected)


def test_a_refusal_of_one_call_is_not_the_next_ones(tiny, monkeypatch):
    monkeypatch.setattr(graph, "GraphEngine", partial(GraphEngine, capture=False))
    tiny.model.generation_config.min_p = 0.1
    texts = Generator("auto", tiny, make_plan("never", tiny.decoder))
    texts.eager = False
    drawn = GenerateOptions(max_new_tokens=6, temperature=0.7, ignore_eos=True)
    assert [texts(PROMPTS[:1], o)[1].name for o in (OPTIONS, drawn, OPTIONS)] == ["graph", "eager", "graph"]


def test_a_stream_knows_its_requests_sampling_alone(tiny):
    """As the eager one: a request says how it is drawn, and the model's own settings of sampling are nobody's."""
    tiny.model.generation_config.min_p = 0.1
    row = Row(tuple(tiny.tokenizer("the sea")["input_ids"]), max_new_tokens=5, temperature=0.8, ignore_eos=True)
    heard = []
    GraphStream(tiny, make_plan("never", tiny.decoder), 100, capture=False)(
        [row], lambda t: heard.append(t.token) or True
    )
    assert len(heard) == 5


# What a call leaves to the next ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, None])
def test_a_text_that_overflows_harms_no_later_one(tmp_path, fused):
    def change(model):
        weight = model.get_input_embeddings().weight.data
        weight[60] = 6.5e4 * torch.sign(weight[60])
        dict(model.named_parameters())["model.layers.0.mlp.down_proj.weight"].data.mul_(1500.0)

    loaded = loaded_of(tmp_path, dtype="float16", change=change)
    engine, broken = engine_of(loaded, fused=fused), loaded.tokenizer.decode([60])
    before = told(engine.generate(["the sea"], OPTIONS))
    engine.generate([f"the old king and {broken}{broken} in her"], OPTIONS)
    assert any(keys.isnan().any() for keys, _ in engine.cache.layers), "nothing overflowed"
    assert told(engine.generate(["the sea"], OPTIONS)) == before


def test_what_a_capture_warms_up_with_teaches_no_thresholds(tiny, monkeypatch):
    def rounds(once, work, name):
        """What `captured` does before it captures."""
        once()
        once()
        return work

    monkeypatch.setattr(engine_module, "captured", rounds)
    monkeypatch.setattr(engine_module, "require_graphs", lambda device: None)
    probe = random_weights(LREProbe(64, 4), 0.5)
    limits = AdaptiveThresholds({1: 0.5}, calibration_steps=10, alpha=0.3, window=16)
    plan = Plan(CascadeGate(4, {1: probe}, limits), ZeroStandIn())
    GraphEngine(tiny, plan, batch=1, max_length=120).prepare(OPTIONS)
    assert [row["tokens"] for row in limits.report()] == [0]


# Lengths --------------------------------------------------------------------------------------------------------------

LONG = {"rope_theta": 1e4, "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 32}  # fmt: skip


def test_a_cache_that_the_model_begins_anew_is_refused(tmp_path):
    loaded = loaded_of(
        tmp_path, "phi3", max_position_embeddings=128, sliding_window=None, rope_parameters=LONG, original_max_position_embeddings=32
    )  # fmt: skip
    engine, plan = engine_of(loaded), make_plan("never", loaded.decoder)
    with pytest.raises(InputError, match="whole cache anew where a text exceeds 33 tokens"):
        engine.generate(["the sea was in"], GenerateOptions(max_new_tokens=40, ignore_eos=True))
    width = len(loaded.tokenizer("the sea was in")["input_ids"])
    for new, served in ((33 - width, True), (34 - width, False)):  # the last token is never read
        options = GenerateOptions(max_new_tokens=new, ignore_eos=True)
        expected = told(generate(loaded, plan.gate, ["the sea was in"], options))
        if served:
            assert told(engine.generate(["the sea was in"], options)) == expected
        else:
            with pytest.raises(InputError, match="whole cache anew"):
                engine.generate(["the sea was in"], options)
    for prompt in ("the sea", words(14)):  # all of it before, all of it behind
        assert told(engine.generate([prompt], OPTIONS)) == told(generate(loaded, plan.gate, [prompt], OPTIONS))


def test_an_engine_with_room_to_spare_is_no_longer_than_a_window(tmp_path, monkeypatch):
    monkeypatch.setattr(graph, "GraphEngine", partial(GraphEngine, capture=False))
    loaded = loaded_of(tmp_path, "gemma2", head_dim=16, max_position_embeddings=1024, sliding_window=300)
    texts = Generator("graph", loaded, make_plan("never", loaded.decoder))
    found, used = texts(["x" * 255], GenerateOptions(max_new_tokens=10, ignore_eos=True))
    assert (used.name, found.new_tokens, texts.graph.max_length) == ("graph", 10, 265)
    assert texts.too_long == {(1, 512)}
    monkeypatch.setattr(graph, "GraphEngine", lambda *a, max_length, **m: pytest.fail(f"{max_length} is asked for"))
    texts(["x" * 200], GenerateOptions(max_new_tokens=10, ignore_eos=True))  # the engine that is there has room


# Gates and stand-ins --------------------------------------------------------------------------------------------------


def standins_of(loaded, rank=5):
    layers = range(loaded.decoder.num_layers)
    return LowRankStandIns({i: random_weights(LowRank(loaded.decoder.hidden_size, rank), 0.1, i) for i in layers})


@pytest.mark.parametrize("family", ["mpt", "opt", "gpt2", "qwen2"])
@pytest.mark.parametrize("zero", [True, False])
def test_a_gate_that_blends_is_eagers(family, zero):
    """Models whose MLP adds the residual itself, whose MLP is two modules of the layer, and others."""
    model = build(family, vocab_size=VOCABULARY, **({"hidden_size": 64, "head_dim": 16} if family == "qwen2" else {}))
    loaded = adopt_model(model, tiny_tokenizer(), family)
    width, layers = loaded.decoder.hidden_size, loaded.decoder.num_layers
    scales = set()
    for limit in (1.0, 2.0, 5.0):
        gate = SoftGate(layers, {1: random_weights(LREProbe(width, 4), 0.5, 1)}, {1: limit})
        plan = Plan(gate, ZeroStandIn() if zero else standins_of(loaded))
        engine = GraphEngine(loaded, plan, batch=1, max_length=60, capture=False)
        expected = generate(loaded, gate, ["the sea was"], OPTIONS, plan.standin)
        assert told(engine.generate(["the sea was"], OPTIONS)) == told(expected), f"{family} {limit}"
        scales.add(float(engine.program.state.scale[0]))
    assert any(0 < scale < 1 for scale in scales), scales


def test_a_gate_that_blends_does_the_same_in_both_paths_for_a_batch(tiny):
    """A row of scale 0 gets the MLP that another row needs."""
    probe, standins = random_weights(LREProbe(64, 4), 0.5, 1), standins_of(tiny)
    mixed = 0
    for limit in (0.5, 1.0, 1.5, 2.0, 3.0):
        plan = Plan(SoftGate(4, {1: probe}, {1: limit}, guards=Guards(sinks=2)), standins)
        fused, generic = (engine_of(tiny, plan, batch=3, fused=way) for way in (True, False))
        for seed in range(4):
            prompts = [words(2 + seed, seed), "x", words(5, seed + 9)]
            assert told(fused.generate(prompts, OPTIONS)) == told(generic.generate(prompts, OPTIONS))
            scale = fused.program.state.scale
            mixed += bool((scale == 0).any() and (scale > 0).any())
    assert mixed, "no batch of which some rows blend and others do not"


def test_routers_and_probes_wider_than_the_kernels(tiny):
    routers = {1: random_weights(Router(64, 80)), 3: random_weights(Router(64, 80), seed=1)}
    assert as_eager(tiny, Plan(LearnedGate(4, routers, 0.0), ZeroStandIn()))
    wide = {1: random_weights(LREProbe(64, 300), 0.1)}
    assert as_eager(tiny, Plan(CascadeGate(4, wide, {1: 0.7}), ZeroStandIn()))


@pytest.mark.parametrize("fused", [None, False])
def test_a_gate_derived_from_a_known_one_may_blend(tiny, fused):
    class Half(AlwaysGate):
        def rule(self, layer, hidden, state):
            return torch.full_like(state.scale, 0.5)

        def holds(self, layer):
            return False

    assert as_eager(tiny, Plan(Half(4, 0), standins_of(tiny)), fused=fused)


def test_a_gate_derived_from_a_known_one_decides_itself(tiny):
    class OnlyEven(AlwaysGate):
        def rule(self, layer, hidden, state):
            return torch.full_like(state.may_skip, layer < self.layer or layer % 2 == 1)

        def holds(self, layer):
            return False

    plan = Plan(OnlyEven(4, 1), ZeroStandIn())
    assert as_eager(tiny, plan)
    assert engine_of(tiny, plan).generate(PROMPTS[:1], OPTIONS).tokens[0][5].skipped == 1


@pytest.mark.parametrize("base", [ZeroStandIn, object])
@pytest.mark.parametrize("fused", [None, False])
def test_a_stand_in_of_another_kind_is_asked(tiny, base, fused):
    class Turned(base):
        def rows(self, layer, x):
            return 50 * x.roll(3, -1)

        def cost_per_token(self, layer):
            return 0.0

    plan = Plan(AlwaysGate(4, 2), Turned())
    assert as_eager(tiny, plan, fused=fused)
    assert not as_eager(tiny, Plan(plan.gate, Turned()), prompt=PROMPTS[0]) or told(
        engine_of(tiny, plan).generate(PROMPTS[:1], OPTIONS)
    ) != told(engine_of(tiny, Plan(plan.gate, ZeroStandIn())).generate(PROMPTS[:1], OPTIONS))


@pytest.mark.parametrize("plus_one", [False, True])
def test_a_norm_with_large_weights_is_told_apart(plus_one):
    """One more is less than the rounding that is allowed for."""

    class Norm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.linspace(22, 40, 64).bfloat16(), requires_grad=False), 1e-6

        def forward(self, x):
            x = x.float()
            y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
            return (y * (self.weight.float() + plus_one)).bfloat16()

    assert _norm(Norm(), "a norm").plus_one is plus_one
