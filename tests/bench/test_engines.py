"""Which engine dense and the configurations beside it run in; the graph engine's steps are run one by one on a CPU."""

from __future__ import annotations

import json
from functools import partial

import pytest

from sedac_cli import models
from sedac_cli.bench.backends import Cell, drafting, hf
from sedac_cli.bench.compare import compare_documents
from sedac_cli.bench.engines import check_engines, wanted_engine
from sedac_cli.bench.matrix import make_matrix
from sedac_cli.errors import InputError, UsageError
from sedac_cli.gates.simple import RandomGate
from sedac_cli.runtime.graph import GraphEngine, capture

EAGER, GRAPH = hf.BASELINES["eager"], hf.BASELINES["graph"]


class Picky(GraphEngine):
    """Runs without a GPU, takes one sequence, and no random gate."""

    def __init__(self, loaded, plan, *, batch, max_length):
        if batch > 1:
            raise InputError(f"{batch} sequences at once are too many", hint="--engine eager")
        if isinstance(plan.gate, RandomGate):
            raise InputError("no coins")
        super().__init__(loaded, plan, batch=batch, max_length=max_length, capture=False)


@pytest.fixture
def graphs(monkeypatch):
    """A machine that can."""
    monkeypatch.setattr(hf, "why_no_graphs", lambda device: None)
    monkeypatch.setattr(hf, "GraphEngine", partial(GraphEngine, capture=False))
    monkeypatch.setattr(capture, "require_graphs", lambda device: None)


@pytest.fixture
def order(monkeypatch):
    """Every run, by engine and whether it was dense's."""
    ran = []

    def spied(kind, engine, is_dense):
        original = kind.run

        def run(self, prompts, new_tokens):
            ran.append((engine, is_dense(self)))
            return original(self, prompts, new_tokens)

        monkeypatch.setattr(kind, "run", run)

    spied(hf.EagerSession, "eager", lambda session: session.plan is None)
    spied(hf.GraphSession, "graph", lambda session: session.engine_object.plan.gate.trivial)
    spied(drafting.DraftingSession, "eager", lambda session: False)
    return ran


@pytest.fixture
def bench(sedac, tmp_path, tiny_folder, text_file):
    small = ("--new-tokens", 4, "--repeats", 1, "--warmup", 0, "--prompt-lengths", "12", "--quality-samples", 0)

    def call(*args):
        own = ("-m", tiny_folder, "--dataset", text_file)
        return sedac("bench", "--save-dir", tmp_path / "out", *own, *small, *args)

    call.folder = tmp_path / "out"
    call.document = lambda: json.loads((tmp_path / "out" / "bench.json").read_text())
    call.report = lambda: (tmp_path / "out" / "report.md").read_text()
    return call


def engines(document):
    return {
        c["name"]: [(cell["batch"], cell["engine"]) for cell in c["cells"]]
        for c in document["configurations"]
    }  # fmt: skip


def a_matrix(*experiments, **more):
    return make_matrix({"experiments": list(experiments)} | more, "m")


DENSE = {"name": "dense", "mode": "dense"}
GATED = {"name": "gated", "gate": "always:2"}
DRAFTS = {"name": "drafts", "mode": "lossless", "gate": "always:2"}


def test_lossless_stands_beside_eager_dense_and_gates_beside_graph_dense(bench, graphs, order):
    result = bench("--gates", "always:2", "--modes", "gated,lossless")
    assert result.code == 0, result.err
    assert order == [("graph", True), ("graph", False), ("eager", True), ("eager", False)]
    found = bench.document()
    assert engines(found) == {
        "dense": [(1, "eager"), (1, "graph")], "always:2": [(1, "graph")], "lossless always:2": [(1, "eager")],
    }  # fmt: skip
    assert [c["engine"] for c in found["configurations"]] == ["eager, graph", "graph", "eager"]
    assert [c["tokens_per_second"]["n"] for c in found["configurations"][0]["cells"]] == [1, 1]  # not thrown together
    assert (EAGER in found["baseline"], GRAPH in found["baseline"]) == (True, True)
    report = bench.report()
    for row in ("| dense | batch 1, prompt 12, eager |", "| dense | batch 1, prompt 12, graph |",
                "| always:2 | batch 1, prompt 12, graph |", "| lossless always:2 | batch 1, prompt 12, eager |"):  # fmt: skip
        assert row in report
    assert f"in the engine of the configuration beside it (graph: {GRAPH}; eager: {EAGER})" in report
    assert "batch 1, prompt 12, graph" in result.out
    changes = compare_documents(found, found).changes
    dense = {change.where for change in changes if change.configuration == "dense"}
    assert dense == {"batch 1, prompt 12, eager", "batch 1, prompt 12, graph"}
    assert all(change.ratio == 1.0 for change in changes)


@pytest.mark.parametrize("first", ["--gates", "--matrix"])
def test_lossless_in_the_graph_engine_by_name_is_refused_before_a_model_is_made(bench, monkeypatch, tmp_path, first):
    monkeypatch.setattr(models, "_from_pretrained", lambda *args: pytest.fail("a model was made"))
    path = tmp_path / "m.json"
    path.write_text(json.dumps({"experiments": [DENSE, DRAFTS | {"engine": "graph"}]}))
    args = ("--gates", "always:2", "--modes", "lossless", "--engine", "graph") if first == "--gates" else (first, path)
    result = bench(*args)
    assert result.code == 2
    assert "lossless drafts run in the eager engine" in result.err
    assert "--engine eager" in result.err


def test_what_is_asked_for_and_what_is_said_agree(bench, graphs, order, tmp_path):
    """All of a matrix by the graph engine, its only configuration by the eager one: dense runs, and is said to run, eager."""
    path = tmp_path / "m.json"
    path.write_text(json.dumps({"engine": "graph", "experiments": [DENSE, DRAFTS | {"engine": "eager"}]}))
    assert bench("--matrix", path).code == 0
    assert {engine for engine, _ in order} == {"eager"}
    found = bench.document()
    assert (found["baseline"], found["subject"]["engine"]) == (EAGER, "eager")
    assert f"- dense is: {EAGER}" in bench.report()


def test_auto_gives_way_for_dense_too(bench, graphs, order, monkeypatch):
    monkeypatch.setattr(hf, "GraphEngine", Picky)
    result = bench("--gates", "always:2,random:0.5", "--batch", "1,2")
    assert result.code == 0, result.err
    own, dense = [engine for engine, is_dense in order if not is_dense], [e for e, is_dense in order if is_dense]
    assert own == dense == ["graph", "eager", "eager", "eager"]
    found = bench.document()
    assert engines(found) == {
        "dense": [(1, "eager"), (1, "graph"), (2, "eager")],
        "always:2": [(1, "graph"), (2, "eager")],
        "random:0.5": [(1, "eager"), (2, "eager")],
    }
    _, always, coin = found["configurations"]
    why = "2 sequences at once are too many"
    assert [cell["engines_refused"] for cell in always["cells"]] == [{}, {"graph": why}]
    assert coin["cells"][0]["engines_refused"] == {"graph": "no coins"}
    assert all(cell["speedup"] for configuration in (always, coin) for cell in configuration["cells"])
    assert (
        f"batch 2, prompt 12: always:2 and dense beside it run in the eager engine; the graph engine refuses: {why}"
        in result.err
    )
    assert (
        f"- always:2, batch 2, prompt 12, eager: in the eager engine, as the graph engine refused: {why}"
        in bench.report()
    )


def test_dense_alone_gives_way_as_well(bench, graphs, order, monkeypatch):
    monkeypatch.setattr(hf, "GraphEngine", Picky)
    result = bench("--batch", "2")
    assert (result.code, order) == (0, [("eager", True)])
    assert "dense runs in the eager engine; the graph engine refuses" in result.err
    assert bench.document()["baseline"] == EAGER


def test_beside_the_floor_a_side_note_says_what_eager_takes(bench, graphs, order, monkeypatch):
    """No row, no pair, no other baseline."""
    monkeypatch.setattr(hf, "read_bandwidth", lambda device: 1e9)
    result = bench("--gates", "always:2", "--batch", "1,2")
    assert result.code == 0, result.err
    found = bench.document()
    assert engines(found) == {name: [(1, "graph"), (2, "graph")] for name in ("dense", "always:2")}
    assert found["baseline"] == GRAPH
    dense, gated = (c["cells"] for c in found["configurations"])
    assert all("aside" not in cell for cell in gated)
    assert order[-4:] == [("eager", True)] * 4  # one warms up
    for cell in dense:
        aside = cell["aside"]
        assert (aside["engine"], len(aside["samples"])) == ("eager", 3)
        assert aside["step_seconds"] == sorted(aside["samples"])[1] > 0
        told = f"{aside['step_seconds'] * 1e3:.1f} ms a step in {cell['label']}"
        ratio = f"({aside['step_seconds'] / cell['floor']['took_seconds']:.1f}x)"
        assert f"{told} {ratio}" in bench.report()
    said = "Side note, no baseline: eager generate()"
    assert said in " ".join(result.out.split())
    assert said in (bench.folder / "report.html").read_text()


def test_without_a_floor_or_with_a_failing_side_note_there_is_none(bench, graphs, order, monkeypatch):
    assert bench("--gates", "always:2").code == 0
    assert {engine for engine, _ in order} == {"graph"}
    assert "Side note" not in bench.report()

    def fail(self, prompts, new_tokens):
        raise RuntimeError("a fault")

    monkeypatch.setattr(hf, "read_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(hf.EagerSession, "run", fail)
    result = bench("--gates", "always:2")
    assert result.code == 0
    assert "batch 1, prompt 12: no side note of eager generate(): RuntimeError: a fault" in result.err
    assert bench.document()["crashed"] == []
    assert "Side note" not in bench.report()


def test_by_name_nothing_gives_way(bench, graphs, order, monkeypatch):
    monkeypatch.setattr(hf, "GraphEngine", Picky)
    result = bench("--gates", "always:2", "--batch", "1,2", "--engine", "graph")
    assert (result.code, {engine for engine, _ in order}) == (3, {"graph"})
    _, own = bench.document()["configurations"]
    assert [cell["batch"] for cell in own["cells"]] == [1]
    assert own["errors"][0]["error"] == "2 sequences at once are too many"


def test_what_cannot_be_captured_is_known_when_it_is_opened(tiny, monkeypatch):
    def refuse(*args, **more):
        raise InputError("cannot be captured")

    monkeypatch.setattr(hf, "GraphEngine", partial(GraphEngine, capture=False))
    monkeypatch.setattr(GraphEngine, "_graph", refuse)
    plan = hf.plan_of(a_matrix(GATED).experiments[0], tiny.decoder, None, 0)
    with pytest.raises(InputError, match="cannot be captured"):
        hf.GraphSession(tiny, plan, Cell(1, 12, 4), None)


def test_an_engine_named_for_dense_is_everybody_s():
    matrix = a_matrix(DENSE | {"engine": "eager"}, GATED, DRAFTS)
    check_engines(matrix)
    assert [wanted_engine(matrix, x) for x in matrix.experiments] == ["eager"] * 3
    auto = a_matrix(DENSE, GATED, DRAFTS)
    assert [wanted_engine(auto, x) for x in auto.experiments] == ["auto", "auto", "eager"]


@pytest.mark.parametrize(
    ("experiments", "more", "said"),
    [
        ([DENSE, DRAFTS], {"engine": "graph"}, "'drafts' is asked for in engine graph"),
        ([DENSE, {"name": "l", "mode": "loop", "engine": "graph"}], {}, "'l' is asked for in engine graph"),
        ([DENSE | {"engine": "eager"}, GATED], {"engine": "graph"}, "'gated' runs in graph: a speed-up"),
        ([DENSE | {"engine": "graph"}, DRAFTS], {}, "'drafts' runs in eager: a speed-up"),
        ([DENSE | {"engine": "graph"}, GATED | {"engine": "eager"}], {}, "'gated' runs in eager: a speed-up"),
        ([DENSE, GATED | {"engine": "eager"}], {"backend": "vllm"}, "'gated' is asked for in engine eager, the others"),
        ([DENSE, GATED], {"backend": "openai", "engine": "eager"}, "engine eager does not reach a server"),
        ([DENSE, GATED | {"engine": "graph"}], {"backend": "openai"}, "'gated': engine graph does not reach a server"),
    ],
)  # fmt: skip
def test_engines_that_contradict_each_other(experiments, more, said):
    with pytest.raises(UsageError) as caught:
        check_engines(a_matrix(*experiments, **more))
    assert said in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("args", [("--url", "http://127.0.0.1:9/v1"), ("--backend", "openai")])
def test_a_server_s_engine_is_its_own(bench, args):
    result = bench(*args, "--engine", "graph")
    assert (result.code, "engine graph does not reach a server" in result.err) == (2, True)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--engine", "garph", "--engine: Input should be 'auto', 'eager' or 'graph'. Did you mean 'graph'?"),
        ("--backend", "tgi", "--backend: Input should be 'hf', 'vllm' or 'openai'."),
        ("--batch", "0", "--batch: 0 is not above 0"),
        ("--prompt-lengths", "8,-1", "--prompt-lengths: -1 is not above 0"),
        ("--batch", "1,,2", "--batch: '1,,2' has an empty entry"),
    ],
)
def test_an_option_that_is_wrong_is_named_as_it_was_written(bench, option, value, said):
    result = bench(option, value)
    assert (result.code, result.err.splitlines()[0]) == (2, f"error: {said}")


def test_another_engine_in_the_later_run_is_said(bench, graphs):
    assert bench("--gates", "always:2", "--engine", "graph").code == 0
    before = bench.document()
    assert bench("--gates", "always:2", "--engine", "eager").code == 0
    notes = compare_documents(before, bench.document()).only_in_one
    assert "another engine: always:2, batch 1, prompt 12: graph before, eager after" in notes
