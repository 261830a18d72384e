"""The graph engine heard token by token is what the eager stream is: same tokens, same decisions, same counts."""

from __future__ import annotations

import pytest
import torch
from conftest import save_tiny

from sedac_cli.errors import InputError
from sedac_cli.gates.base import Guards
from sedac_cli.models import load_model
from sedac_cli.runtime.graph.state import KVCache
from sedac_cli.runtime.graph.stream import KEPT, GraphStream
from sedac_cli.runtime.plan import make_plan
from sedac_cli.runtime.stream import Row, stream

PROMPTS = ["the sea was grey and", "an old king", "x"]
SPECS = ["never", "always:2", "stability:tau=0.5,k=1,min_layer=1"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("tiny"), hidden_size=64, max_position_embeddings=256)
    return load_model(str(folder))


def plan_of(loaded, spec):
    return make_plan(spec, loaded.decoder, guards=Guards(sinks=2))


def made(loaded, spec, **options):
    return GraphStream(loaded, plan_of(loaded, spec), 120, capture=False, burst=4, **options)


def rows_of(loaded, **options):
    return [Row(tuple(loaded.tokenizer(p)["input_ids"]), **{"max_new_tokens": 15} | options) for p in PROMPTS]


def heard(run, rows, until=lambda token: True):
    tokens, prompts = [[] for _ in rows], []

    def hear(token):
        tokens[token.row].append(token)
        return until(token)

    return tokens, prompts, run(rows, hear, lambda index, counts: prompts.append((index, counts.skipped)))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("options", [{}, {"ignore_eos": True}, {"max_new_tokens": 1}, {"max_new_tokens": 2}])
def test_it_is_the_eager_stream(tiny, spec, options):
    rows = rows_of(tiny, **options)
    found, read, counts = heard(made(tiny, spec), rows)
    plan = plan_of(tiny, spec)
    for index, row in enumerate(rows):
        [wanted], [(_, prompt)], [count] = heard(lambda *a: stream(tiny, plan, *a), [row])
        facts = [(t.token, t.skipped, t.exit_layer, t.finish) for t in found[index]]
        assert facts == [(t.token, t.skipped, t.exit_layer, t.finish) for t in wanted]
        for mine, theirs in zip(found[index], wanted, strict=True):
            assert mine.entropy == pytest.approx(theirs.entropy, abs=1e-3)
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-3)
        assert counts[index] == count
        assert read[index] == (index, prompt)


def test_a_dense_row_skips_nothing_and_the_next_one_does(tiny):
    run = made(tiny, "always:2")
    [gated], _, _ = heard(run, rows_of(tiny)[:1])
    [dense], _, [counts] = heard(run, rows_of(tiny, dense=True)[:1])
    [never], _, _ = heard(made(tiny, "never"), rows_of(tiny)[:1])
    assert counts.skipped == 0
    assert counts.exits == {}
    assert [t.token for t in dense] == [t.token for t in never]
    assert all(t.skipped == 0 for t in dense)
    [again], _, [counts] = heard(run, rows_of(tiny)[:1])
    assert again == gated
    assert counts.skipped > 0


@pytest.mark.parametrize("stop", [1, 2, 7])
def test_a_row_that_nobody_wants_ends_at_its_token(tiny, stop):
    [row, *_] = rows_of(tiny, ignore_eos=True)
    seen: list = []
    _, _, [counts] = heard(made(tiny, "always:2"), [row], lambda t: seen.append(t) or len(seen) < stop)
    assert len(seen) == counts.new_tokens == stop
    assert counts.processed == {"prefill": len(row.prompt), "decode": stop - 1}


def test_draws_follow_the_row_seed(tiny):
    run = made(tiny, "always:2")

    def drawn(seed, **options):
        [tokens], _, _ = heard(run, rows_of(tiny, temperature=1.0, seed=seed, ignore_eos=True, **options)[:1])
        return [t.token for t in tokens]

    assert drawn(1) == drawn(1)
    assert len({tuple(drawn(seed)) for seed in range(4)}) > 1
    greedy, _, _ = heard(run, rows_of(tiny, ignore_eos=True)[:1])
    assert drawn(5, top_k=1) == [t.token for t in greedy[0]]


def test_graphs_of_many_settings_do_not_pile_up(tiny):
    run = made(tiny, "always:2")
    for number in range(3 * KEPT):
        heard(run, rows_of(tiny, temperature=1 + number / 10, ignore_eos=True)[:1])
    assert len(run.gated.graphs) == 2
    for number in range(3 * KEPT):
        heard(run, rows_of(tiny, temperature=1.0, top_k=1 + number, ignore_eos=True)[:1])
    assert len(run.gated.graphs) <= KEPT + 2


@pytest.fixture
def crowded(monkeypatch):
    """A device that has no room for caches of more than 320 places."""
    original = KVCache.__init__

    def init(self, loaded, rows, places):
        if places > 320:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")
        original(self, loaded, rows, places)

    monkeypatch.setattr(KVCache, "__init__", init)


def test_a_shorter_cache_is_taken_only_if_asked(tiny, crowded):
    plan = plan_of(tiny, "always:2")
    with pytest.raises(
        InputError, match=r"out of GPU memory for a cache of 1 x 1200 tokens: CUDA .* 9.00 GiB"
    ) as caught:
        GraphStream.fitting(tiny, plan, 1200, capture=False)
    assert "--shrink" in caught.value.hint
    run = GraphStream.fitting(tiny, plan, 1200, shrink=True, capture=False)
    assert run.max_length == run.gated.max_length == run.dense.max_length == 300
    assert len(run.gated.graphs) == len(run.dense.graphs) == 2  # ready before the first request
    [tokens], _, _ = heard(run, rows_of(tiny)[:1])
    assert tokens == heard(made(tiny, "always:2"), rows_of(tiny)[:1])[0][0]
    assert len(run.gated.graphs) == 2
    with pytest.raises(InputError, match="1 x 500 tokens"):
        GraphStream.fitting(tiny, plan, 500, shrink=True, capture=False)  # half of it is too short for anybody


def test_no_room_beside_the_cache_is_said_alike(tiny, monkeypatch):
    def full(*args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("sedac_cli.runtime.graph.lookup.rotary_tables", full)
    with pytest.raises(InputError, match=r"^out of GPU memory for a cache of 1 x 300 tokens: CUDA .* 2.00 GiB"):
        GraphStream(tiny, plan_of(tiny, "always:2"), 300, capture=False)


def test_what_it_cannot_tell_or_hold_is_refused(tiny):
    run = made(tiny, "never")
    assert run.dense is run.gated
    with pytest.raises(InputError, match="probabilities"):
        heard(run, rows_of(tiny, top_logprobs=2))
    with pytest.raises(InputError, match="120 places"):
        heard(run, rows_of(tiny, max_new_tokens=130))
