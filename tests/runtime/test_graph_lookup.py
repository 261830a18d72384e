"""Both ends of a decode step on a CPU: tables that are the modules to the bit, or the modules themselves; states and records."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import save_tiny, tiny_model, words
from torch import nn

from sedac_cli.models import load_model
from sedac_cli.runtime.generate import GenerateOptions
from sedac_cli.runtime.graph import GraphEngine
from sedac_cli.runtime.graph import lookup as graph_lookup
from sedac_cli.runtime.graph.lookup import Lookup, plain, rotary_tables
from sedac_cli.runtime.graph.ops import TwinOps
from sedac_cli.runtime.graph.state import Burst, Choice, State
from sedac_cli.runtime.plan import make_plan

PLACES = 75
ROPE = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = ROPE | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES = {
    "qwen2": {}, "llama": {}, "llama3": {"rope_parameters": LLAMA3}, "yarn": {"rope_parameters": ROPE | {"rope_type": "yarn"}},
    "gemma": {"head_dim": 16}, "phi3": {}, "phi3 in part": {"partial_rotary_factor": 0.5},
}  # fmt: skip
DYNAMIC = {
    "rope_parameters": {"rope_theta": 10000.0, "factor": 4.0, "rope_type": "dynamic"},
    "max_position_embeddings": 32,
}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


def backbone(name: str, dtype: torch.dtype = torch.float32):
    family = {"llama3": "llama", "yarn": "llama"}.get(name, name.split()[0])
    return tiny_model(family, hidden_size=64, **FAMILIES[name]).to(dtype).model


def state_of(tokens: list[int], position: list[int], finished: list[bool] | None = None) -> State:
    rows = len(tokens)
    ended = torch.tensor(finished or [False] * rows)
    return State(
        torch.tensor(tokens), torch.tensor(position), torch.zeros(rows, dtype=torch.long), ended, torch.tensor([7])
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_what_is_looked_up_is_what_the_modules_give(name, dtype, monkeypatch):
    """At every position, in batches of several sizes: as a step called them before there were tables."""
    monkeypatch.setattr(graph_lookup, "CHUNK", 32)
    model = backbone(name, dtype)
    lookup = Lookup(model.embed_tokens, model.rotary_emb, PLACES)
    assert lookup.tables is not None
    assert lookup.tables[0].shape[0] == PLACES
    assert (lookup.weight is None) == (name == "gemma"), "Gemma's embedding scales its rows"
    for rows in (1, 3, 25):
        for begin in range(0, PLACES, rows):
            state = state_of([(7 * begin + i) % 97 for i in range(rows)], [*range(begin, begin + rows)])
            h, (cos, sin), real = lookup(state, TwinOps())
            assert torch.equal(h, model.embed_tokens(state.tokens))
            expected = model.rotary_emb(h.unsqueeze(1), state.position.unsqueeze(1))
            for found, table in zip((cos, sin), expected, strict=True):
                assert found.dtype == dtype
                assert torch.equal(found, table.reshape(rows, -1).to(dtype))
            assert real.all()


@pytest.mark.parametrize(
    ("family", "config"),
    [("llama", DYNAMIC), ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 32})],
)
@torch.inference_mode()
def test_positions_that_follow_the_length_are_asked_for_in_every_step(family, config, monkeypatch):
    model = tiny_model(family, hidden_size=64, **config).model
    with monkeypatch.context() as patched:
        patched.setattr(
            type(model.rotary_emb), "forward", None
        )  # a call at the last place would change its frequencies
        lookup = Lookup(model.embed_tokens, model.rotary_emb, PLACES)
    assert lookup.tables is None
    assert lookup.weight is model.embed_tokens.weight
    for place in (3, 60, 5):
        h, turns, _ = lookup(state_of([4], [place]), TwinOps())
        expected = model.rotary_emb(h.unsqueeze(1), torch.tensor([[place]]))
        assert all(torch.equal(a, b[0]) for a, b in zip(turns, expected, strict=True))


def test_a_model_with_dynamic_positions_generates_what_transformers_generates(tmp_path):
    loaded = load_model(str(save_tiny(tmp_path, "llama", hidden_size=64, **DYNAMIC)))
    engine = GraphEngine(loaded, make_plan("never", loaded.decoder), max_length=120, capture=False)
    assert engine.path == "fused"
    assert engine.step.lookup.tables is None
    loaded.model.config.max_position_embeddings = 120  # beyond this is refused; the module goes on counting from 32
    ids = loaded.tokenizer("the sea", return_tensors="pt")["input_ids"]
    expected = loaded.model.generate(ids, max_new_tokens=60, eos_token_id=None, do_sample=False)
    done = engine.run(ids, torch.ones_like(ids), GenerateOptions(max_new_tokens=60))
    assert torch.equal(torch.cat([done.first, done.tokens[:, 0]]), expected[0, ids.shape[1] :])


def test_modules_that_someone_has_changed_are_called():
    model = backbone("llama")
    rotary, embedding = model.rotary_emb, model.embed_tokens
    assert plain(embedding)
    handle = embedding.register_forward_hook(lambda module, args, out: 2 * out)
    assert not plain(embedding)
    handle.remove()
    embedding.forward = lambda ids: nn.Embedding.forward(embedding, ids)
    assert not plain(embedding)
    assert not plain(nn.Embedding(5, 4, max_norm=1.0))
    assert plain(nn.Embedding(5, 4, padding_idx=0))
    whole = nn.Embedding(97, 64)
    rotary.rope_type = {"full_attention": "default"}
    assert rotary_tables(rotary, whole, PLACES) is None
    rotary.rope_type = "default"
    assert rotary_tables(rotary, whole, PLACES) is not None
    handle = rotary.register_forward_pre_hook(lambda module, args: None)
    assert rotary_tables(rotary, whole, PLACES) is None


def test_a_module_whose_rows_depend_on_each_other_is_called():
    """Whatever it says of its kind: the table is compared with it."""

    class Whole(nn.Module):
        rope_type = "default"

        def forward(self, x, position):
            angle = position[..., None] / position.max().clamp_min(1) + torch.zeros(8)
            return angle.cos().to(x.dtype), angle.sin().to(x.dtype)

    assert rotary_tables(Whole(), nn.Embedding(5, 4), PLACES) is None


@torch.inference_mode()
def test_an_index_out_of_bounds_reads_the_nearest_row():
    model = backbone("qwen2")
    lookup = Lookup(model.embed_tokens, model.rotary_emb, PLACES)
    h, turns, real = lookup(state_of([-1, 97, 3], [-2, PLACES, 10**9], [True, False, True]), TwinOps())
    assert torch.equal(h, model.embed_tokens.weight[[0, 96, 3]])
    assert lookup.tables is not None
    for found, table in zip(turns, lookup.tables, strict=True):
        assert torch.equal(found, table[[0, PLACES - 1, PLACES - 1]])
    assert real.tolist() == [False, True, False]


@pytest.mark.parametrize("ends", [[], [5], [9, 5, 1]])
def test_the_end_of_a_step(ends):
    state, burst = state_of([3, 3, 3, 3], [6, 2, 0, 9], [False, True, False, False]), Burst.empty(3, 4, 2, "cpu")
    burst.needs.fill_(-1)
    choice = Choice(torch.tensor([5, 5, 8, 9]), torch.arange(4.0), torch.tensor([1.0, 0.5, 0.25, 0.125]))
    TwinOps().step_end(choice, state, torch.tensor(ends, dtype=torch.long), 2, torch.tensor([1, 0]).int(), burst.at(1))
    assert state.tokens.tolist() == [5, 2, 8, 9], "a row that had finished goes on with the pad token"
    assert state.finished.tolist() == [5 in ends, True, False, 9 in ends]
    assert state.position.tolist() == [7, 3, 1, 10]
    assert state.slot.tolist() == [8]
    assert burst.tokens.tolist() == [[0] * 4, [5, 2, 8, 9], [0] * 4]
    assert burst.needs.tolist() == [[-1, -1], [1, 0], [-1, -1]]
    assert burst.entropy[1].tolist() == [0, 1, 2, 3]
    assert torch.equal(burst.logprob[1], torch.tensor([1.0, 0.5, 0.25, 0.125]).log())
    assert torch.equal(burst.finished, state.finished)
    below = torch.tensor([0.0, -1.0, -2.0, -0.5])
    drawn = Choice(choice.token, choice.entropy, choice.confidence, below)
    TwinOps().step_end(drawn, state, torch.tensor(ends, dtype=torch.long), 2, torch.tensor([0, 0]).int(), burst.at(2))
    assert torch.equal(burst.logprob[2], below + choice.confidence.log())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_engine_records_what_its_steps_chose(tmp_path, fused, temperature):
    """Entropy and log-probability are those of the logits the token was chosen from."""
    loaded = load_model(str(save_tiny(tmp_path, hidden_size=64)))
    plan = make_plan("always:2", loaded.decoder)
    engine = GraphEngine(loaded, plan, batch=2, max_length=64, capture=False, fused=fused)
    logits, bursts, step = [], [], engine.step

    def kept(state):
        logits.append(step(state).clone())
        return logits[-1]

    class Listener:
        def prompt(self, *seen):
            return False

        def burst(self, burst, ran):
            bursts.append(burst)
            return False

    engine.step = kept
    ids = loaded.tokenizer(words(5), return_tensors="pt")["input_ids"].repeat(2, 1)
    options = GenerateOptions(max_new_tokens=12, temperature=temperature, seed=1)
    done = engine.run(ids, torch.ones_like(ids), options, listener=Listener())
    exact = torch.log_softmax(torch.stack(logits).float(), dim=-1)
    tokens, logprob, entropy = (torch.cat([getattr(b, n) for b in bursts]) for n in ("tokens", "logprob", "entropy"))
    assert torch.equal(tokens, done.tokens)
    assert tokens.shape == (11, 2)
    assert (logprob - exact.gather(2, tokens.unsqueeze(2)).squeeze(2)).abs().max() < 1e-4
    assert (entropy - -(exact.exp() * exact).sum(-1) / math.log(2)).abs().max() < 1e-4
    assert torch.equal(tokens, exact.argmax(-1)) == (temperature == 0)
