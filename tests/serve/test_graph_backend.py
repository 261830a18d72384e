"""The server around the graph engine, its steps run one by one on a CPU: answers, counters and refusals are the eager one's."""

from __future__ import annotations

import threading
from functools import partial

import pytest
from conftest import save_tiny
from serving import serving

from sedac_cli.commands.serve import Caches, backend_named, graph_stream
from sedac_cli.console import Output
from sedac_cli.errors import InputError
from sedac_cli.gates.base import Guards
from sedac_cli.models import load_model
from sedac_cli.runtime.graph.stream import GraphStream
from sedac_cli.runtime.plan import make_plan


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(str(save_tiny(tmp_path_factory.mktemp("tiny"), hidden_size=64, max_position_embeddings=2048)))


@pytest.fixture(scope="module")
def server(loaded):
    plan = make_plan("always:2", loaded.decoder, guards=Guards(sinks=2))
    backend = GraphStream(loaded, plan, 1500, capture=False)
    with serving(loaded, backend=backend, context=1500, top_logprobs=False, max_batch=1) as running:
        yield running


def ask(server, **more):
    given = {"model": "tiny", "prompt": "the sea was", "max_tokens": 12, "temperature": 0}
    return server.client().completions.create(**given | more)


def test_many_at_once_get_what_the_eager_engine_gives(server, loaded):
    with serving(loaded) as eager:
        wanted = {n: ask(eager, max_tokens=n) for n in (1, 5, 12)}
        dense = ask(eager, extra_body={"sedac": {"dense": True}})
    found = {}

    def one(n):
        found[n] = ask(server, max_tokens=n)

    threads = [threading.Thread(target=one, args=(n,)) for n in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, answer in wanted.items():
        assert found[n].choices[0].text == answer.choices[0].text
        assert found[n].sedac["exits"] == answer.sedac["exits"]
        assert found[n].sedac["calls"] == answer.sedac["calls"]
    other = ask(server, extra_body={"sedac": {"dense": True}})
    assert other.choices[0].text == dense.choices[0].text
    assert other.sedac["skip_ratio"] == 0.0
    assert "".join(c.choices[0].text for c in ask(server, stream=True)) == wanted[12].choices[0].text


def test_hanging_up_ends_the_work(server):
    before = server.counters()
    stream = ask(server, stream=True, max_tokens=1400, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    server.wait(server.quiet)
    after = server.counters()
    name = "sedac_requests_total{completions,cancelled}"
    assert after[name] == before.get(name, 0) + 1
    assert after["sedac_generated_tokens_total"] - before["sedac_generated_tokens_total"] < 1400
    assert ask(server).usage.completion_tokens >= 1


@pytest.mark.parametrize(
    ("body", "says"),
    [({"logprobs": 3}, "only the probability of the token it chose"), ({"max_tokens": 1600}, "1500 positions")],
)
def test_what_it_cannot_do_is_refused(server, body, says):
    answer = server.post("/v1/completions", json={"prompt": "the sea"} | body)
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]
    assert server.post("/v1/completions", json={"prompt": "the sea", "logprobs": 0}).status_code == 200


@pytest.fixture
def start(loaded, monkeypatch, capsys):
    """Caches as the command makes them, and what it says of them."""
    monkeypatch.setattr(GraphStream, "fitting", partial(GraphStream.fitting, capture=False))

    def call(places, shrink=False):
        capsys.readouterr()
        made = graph_stream(Output(), loaded, make_plan("always:2", loaded.decoder), Caches(places, shrink))
        return made.max_length, capsys.readouterr().err

    return call


def test_a_length_that_is_cut_is_said(start):
    assert start(1500) == (1500, "")
    assert start(None) == (2048, "")  # nobody asked for more
    length, said = start(20_000_000)
    assert (length, "--max-length 20000000 is more than the model's 2048 positions: it is 2048" in said) == (2048, True)


def test_lengths_are_halved_until_there_is_room(start, monkeypatch):
    """As docs/serve.md has it, and never without being asked."""

    class OutOfMemoryError(RuntimeError):
        pass

    original = GraphStream.__init__

    def full(self, loaded, plan, max_length, **options):
        if max_length > 300:
            raise OutOfMemoryError("no room")
        original(self, loaded, plan, max_length, **options)

    monkeypatch.setattr(GraphStream, "__init__", full)
    assert start(2048, shrink=True) == (256, "no room for caches of 2048 tokens: --max-length is 256\n")
    with pytest.raises(OutOfMemoryError):
        start(2048)


def test_refusals_name_the_servers_own_option():
    with pytest.raises(InputError) as caught, backend_named():
        raise InputError("bloom cannot", hint="--engine eager (of sedac serve: --backend eager) runs anywhere")
    assert caught.value.hint == "--backend eager runs any model anywhere"
    with pytest.raises(InputError) as caught, backend_named():
        raise InputError("no room", hint="a smaller --max-length")
    assert caught.value.hint == "a smaller --max-length"


def test_without_a_gpu_it_is_refused(sedac, tiny_folder):
    result = sedac("serve", "--backend", "graph", "--model", tiny_folder, "--port", 0)
    assert result.code == 3
    assert "GPU" in result.err or "CUDA" in result.err
