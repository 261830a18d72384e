"""A generator that is called again and again: one graph engine, kept while calls fit it; what `auto` cannot have is asked for once."""

from __future__ import annotations

from functools import partial

import pytest

from sedac_cli import create_pipeline
from sedac_cli.errors import InputError, UsageError
from sedac_cli.gates.deep import DeepThinking
from sedac_cli.runtime import graph
from sedac_cli.runtime.engines import SHORTEST, Generator
from sedac_cli.runtime.generate import GenerateOptions, generate
from sedac_cli.runtime.plan import make_plan

OPTIONS = GenerateOptions(max_new_tokens=6, ignore_eos=True)


@pytest.fixture
def made(monkeypatch):
    """Steps run one by one, on the CPU; the engines that were made."""
    found = []

    def make(*args, **more):
        found.append(graph_engine(*args, **more))
        return found[-1]

    graph_engine = partial(graph.GraphEngine, capture=False)
    monkeypatch.setattr(graph, "GraphEngine", make)
    return found


def test_an_engine_is_kept_while_calls_fit_it(tiny, made):
    plan = make_plan("always:2", tiny.decoder)
    texts = Generator("graph", tiny, plan)
    for prompt in ("the sea", "an old king ran"):
        found, used = texts([prompt], OPTIONS)
        assert found.texts == generate(tiny, plan.gate, [prompt], OPTIONS).texts
        assert (used.name, used.path) == ("graph", made[0].path)
    assert [(one.batch, one.max_length) for one in made] == [(1, 128)]  # all the model's positions, fewer than SHORTEST
    assert SHORTEST > 128
    texts(["the sea", "an old king ran"], OPTIONS)
    texts(["the sea"], OPTIONS)
    assert [one.batch for one in made] == [1, 2, 1]


def test_an_engine_grows(tiny, made, monkeypatch):
    monkeypatch.setattr("sedac_cli.runtime.engines.SHORTEST", 16)
    texts = Generator("graph", tiny, make_plan("never", tiny.decoder))
    for new in (4, 6, 60, 5):
        assert texts(["the sea"], GenerateOptions(max_new_tokens=new, ignore_eos=True))[0].new_tokens == new
    lengths = [one.max_length for one in made]
    assert lengths == sorted(set(lengths))
    assert len(lengths) == 2


def test_what_auto_cannot_have_is_asked_for_once(tiny, monkeypatch):
    asked = []

    def refuse(*args, **more):
        asked.append(more)
        raise InputError("no room", hint="less")

    monkeypatch.setattr(graph, "GraphEngine", refuse)
    texts = Generator("auto", tiny, make_plan("never", tiny.decoder))
    assert texts(["the sea"], OPTIONS)[1].name == "eager"  # no GPU: nobody is asked
    assert not asked
    texts.eager = False
    for _ in range(2):
        found, used = texts(["the sea"], OPTIONS)
        assert (used.name, used.notes) == ("eager", ["the graph engine could not serve this: no room"])
        assert found.new_tokens == 6
    assert [one["max_length"] for one in asked] == [128, 11]  # with room to spare, without, and not again
    texts.engine = "graph"
    texts.refused.clear()
    with pytest.raises(InputError, match="no room"):
        texts(["the sea"], OPTIONS)


def test_the_pipeline_says_what_it_ran_in(tiny, tiny_folder, made, monkeypatch, caplog):
    plain = create_pipeline(tiny, gate="always:2")
    expected = plain("the sea", max_new_tokens=6, ignore_eos=True)
    assert plain.used.name == "eager"
    with pytest.raises(InputError, match="needs a CUDA GPU"):
        create_pipeline(tiny, gate="always:2", engine="graph")
    with pytest.raises(InputError, match="needs a CUDA GPU"):
        create_pipeline(str(tiny_folder), gate="always:2", engine="graph")
    with pytest.raises(UsageError, match="Did you mean 'graph'"):
        create_pipeline(tiny, gate="always:2", engine="grpah")
    monkeypatch.setattr("sedac_cli.engine.require_engine", lambda *args, **more: None)
    pipeline = create_pipeline(tiny, gate="always:2", engine="graph")
    for _ in range(2):
        found = pipeline("the sea", max_new_tokens=6, ignore_eos=True)
        assert found.text == expected.text
        assert found.skip_ratio == pytest.approx(expected.skip_ratio)
        assert found.avg_exit_layer == pytest.approx(expected.avg_exit_layer)
    assert (pipeline.used.name, len(made)) == ("graph", 1)
    pipeline.engine.gate = make_plan("never", tiny.decoder).gate
    assert pipeline("the sea", max_new_tokens=6).skip_ratio == 0
    assert len(made) == 2
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_deep_thinking_is_eagers(tiny):
    with pytest.raises(UsageError, match="deep thinking"):
        create_pipeline(tiny, gate="always:2", engine="graph", deep=DeepThinking(tau_high=1.0))
