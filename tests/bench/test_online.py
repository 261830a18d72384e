"""Load on a server that really listens: what is measured when it behaves, and what is said when it does not."""

from __future__ import annotations

import json
import socket
import time

import pytest
from fake_server import Server

from sedac_cli.bench.online import Endpoint, LoadClient

PROMPTS = ["the sea was grey", "an old king", "x", "in her hand the wind"]


@pytest.fixture
def server():
    with Server() as server:
        yield server


def load(url: str, prompts=PROMPTS, new_tokens=6, timeout=10.0, chat=False, **how):
    with LoadClient(Endpoint(url, "fake", chat, timeout=timeout)) as client:
        return client.load(prompts, new_tokens, **(how or {"at_once": 2}))


def test_times_and_tokens_of_a_server_that_behaves(server):
    answers = load(server.url())
    assert [a.request.error for a in answers] == [None] * 4
    assert [(a.request.prompt_tokens, a.request.new_tokens) for a in answers] == [(7, 6)] * 4
    for answer in answers:
        assert answer.request.ttft >= 0.02
        assert len(answer.gaps) == 5
        assert answer.request.latency >= 0.02 + 5 * 0.01
        assert answer.request.latency == pytest.approx(answer.request.ttft + sum(answer.gaps), abs=1e-6)
    assert [body["prompt"] for body in server.bodies] != []
    assert sorted(body["prompt"] for body in server.bodies) == sorted(PROMPTS)


def test_chat(server):
    answers = load(server.url(), chat=True)
    assert all(a.request.error is None and a.request.new_tokens == 6 for a in answers)
    assert server.bodies[0]["messages"][0]["role"] == "user"


@pytest.mark.parametrize("count", [1, 2, 8])
def test_as_many_at_once_as_asked_for(count):
    with Server(first=0.4) as server:
        load(server.url(), PROMPTS * 4, 1, at_once=count)
    assert server.most_at_once == count


def test_a_rate_does_not_wait_for_answers():
    with Server(first=0.4) as server:
        began = time.perf_counter()
        answers = load(server.url(), PROMPTS * 3, 1, rate=50.0)
        took = time.perf_counter() - began
    assert all(a.request.error is None for a in answers)
    assert server.most_at_once > 3
    assert took < 12 * 0.4
    sent = [a.request.sent for a in answers]
    assert sent == sorted(sent)
    assert 0.9 * 11 / 50 < sent[-1] < 2


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ("error", "HTTP 500: out of luck"),
        ("page", "HTTP 502: <html>bad gateway</html>"),
        ("context", "HTTP 400: This model's maximum context length is 200 tokens."),
        ("whole", 'not a stream of events: {"choices": [{"text": "hello"}]}'),
        ("cut", "the stream ended before the answer did (in mid-answer)"),
        ("badjson", 'an event that is not JSON: {"choices": [{"te (in mid-answer)'),
        ("fails", "engine died (in mid-answer)"),
    ],
)
def test_what_is_said_of_a_server_that_misbehaves(server, way, said):
    answers = load(server.url(way))
    assert [a.request.error for a in answers] == [said] * 4
    if "mid-answer" in said:
        assert {a.request.new_tokens for a in answers} == {2}  # what had come is not lost


def test_one_that_hangs_is_given_up(server):
    answers = load(server.url("hangs"), timeout=0.5)
    assert {a.request.error for a in answers} == {"no answer within 0.5 s (in mid-answer)"}
    assert all(0.4 < a.request.latency < 1.4 for a in answers)


def test_some_fail_and_the_others_count(server):
    answers = load(server.url("flaky"), PROMPTS * 3)
    failed = [a for a in answers if a.request.error]
    assert (len(answers), len(failed)) == (12, 4)


def test_one_that_dies_in_mid_run():
    with Server() as server:
        answers = load(server.url("dies"), PROMPTS * 3, at_once=1)
    errors = [a.request.error for a in answers]
    assert errors[:3] == [None] * 3
    assert len(errors) == 12
    assert set(errors[3:]) <= {"cannot connect", "the connection broke"}


# The command line ---------------------------------------------------------------------------------------------


def bench(sedac, folder, *args):
    return sedac("bench", "--save-dir", folder, "--new-tokens", 4, "--requests", 6, "--repeats", 2, "-q", *args)


def document(folder):
    return json.loads((folder / "bench.json").read_text())


def test_two_servers_under_the_same_load(sedac, server, tmp_path):
    result = bench(sedac, tmp_path, "--url", server.url("worse"), "--baseline-url", server.url(), "--concurrency", "1,3",
                   "--request-rates", "40", "--prompt-lengths", "8,16", "--quality-samples", 3)  # fmt: skip
    assert (result.code, result.err) == (0, "")
    _, own = document(tmp_path)["configurations"]
    assert [cell["label"] for cell in own["cells"]] == ["1 at once", "3 at once", "40 requests/s"]
    for cell in own["cells"]:
        assert cell["requests"] == {"sent": 12, "done": 12, "failed": 0, "errors": {}}
        assert cell["ttft_seconds"]["p50"] >= 0.02
        assert len(cell["samples"]["own"][0]["requests"]) == 6
    assert 0.3 < own["cells"][0]["speedup"]["median"] < 3
    assert "speedup" not in own["cells"][2]
    assert own["quality"]["measures"]["ppl_ratio"] == pytest.approx(1.5)
    counted = [int(tokens) for tokens in own["quality"]["per_sequence"]["tokens"]]
    others = sum(-(-count // 4) for count in counted)  # every fourth place, from the first
    assert own["quality"]["measures"]["agreement"] == pytest.approx(1 - others / sum(counted))
    lengths = {len(body["prompt"]) for body in server.bodies if not body.get("echo")}
    assert lengths == {32, 64}
    assert "requests/s" in result.out
    assert (
        "- model: fake, " in (tmp_path / "report.md").read_text()
    )  # as the server says, whatever a matrix takes for granted


def test_the_page_of_a_server_s_benchmark_is_whole(sedac, server, tmp_path):
    pytest.importorskip("matplotlib")
    args = ("--save-dir", tmp_path, "--new-tokens", 4, "--requests", 2, "--repeats", 1)
    result = sedac("bench", "--url", server.url(), *args)
    assert result.code == 0
    assert "could not be shown" not in result.err
    assert document(tmp_path)["subject"]["model"] == "fake"
    assert "model fake" in (tmp_path / "report.html").read_text()


def test_a_server_that_tells_no_alternatives_has_no_agreement(sedac, server, tmp_path):
    assert (
        bench(
            sedac, tmp_path, "--url", server.url("notops"), "--baseline-url", server.url(), "--quality-samples", 2
        ).code
        == 0
    )
    measures = document(tmp_path)["configurations"][1]["quality"]["measures"]
    assert measures["ppl_ratio"] == pytest.approx(1.0)
    assert "agreement" not in measures


def test_a_failing_server_is_in_the_table_and_no_success(sedac, server, tmp_path):
    result = bench(sedac, tmp_path, "--url", server.url("flaky"), "--concurrency", "2")
    assert result.code == 3
    assert "1 of 1 configurations crashed" in result.err
    found = document(tmp_path)
    assert found["complete"]
    cell = found["configurations"][0]["cells"][0]
    assert cell["requests"]["failed"] == cell["requests"]["errors"]["HTTP 500: out of luck"] > 0
    assert cell["requests"]["done"] > 0
    assert "of 12 requests failed" in found["configurations"][0]["errors"][0]["error"]


def test_one_dead_server_of_two(sedac, server, tmp_path):
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{place.getsockname()[1]}/v1"
    result = bench(sedac, tmp_path, "--url", dead, "--baseline-url", server.url(), "--concurrency", "2")
    assert result.code == 3
    _, own = document(tmp_path)["configurations"]
    assert own["errors"][0]["error"] == f"{dead}/models: cannot connect"
    assert own["cells"] == []


@pytest.mark.parametrize(
    ("way", "args", "said"),
    [
        ("nologprobs", ("--quality-samples", 2), "gives no log-probabilities of a prompt"),
        ("nonsense", (), "answered something that is not JSON: <html>hello</html>"),
        ("short", ("--prompt-lengths", "300"), "prompts of 300 tokens and 4 new ones exceed the server's 200"),
        ("ok", ("--model", "other"), "serves fake, not 'other'"),
        ("bare", (), "(most servers want the URL to end in /v1)"),
    ],
)
def test_clear_lines(sedac, server, tmp_path, way, args, said):
    url = server.url(way).removesuffix("/v1") if way == "bare" else server.url(way)
    result = bench(sedac, tmp_path, "--url", url, *args)
    assert result.code == 3
    assert said in document(tmp_path)["configurations"][0]["errors"][0]["error"]


def test_what_makes_no_sense_is_refused_at_once(sedac, tmp_path):
    assert "is not a URL" in bench(sedac, tmp_path, "--url", "localhost:8000").err
    assert "names no server" in bench(sedac, tmp_path, "--backend", "openai").err
    assert bench(sedac, tmp_path, "--backend", "opneai").code == 2
    url = ("--url", "http://127.0.0.1:9/v1")
    assert "its gate is its own" in bench(sedac, tmp_path, *url, "--gates", "always:2").err
    assert "--requests is load on a server" in bench(sedac, tmp_path, "--gates", "never").err
    matrix = tmp_path / "m.json"
    matrix.write_text(json.dumps({"experiments": [{"name": "a", "mode": "dense"}, {"name": "b", "gate": "always:2"}]}))
    refused = bench(sedac, tmp_path, *url, "--matrix", matrix)
    assert (refused.code, "'a' and 'b' ask the same of the same server" in refused.err) == (2, True)


def test_one_server_asked_in_two_ways(sedac, server, tmp_path):
    matrix = tmp_path / "m.json"
    ways = [
        {"name": "dense", "mode": "dense", "extra_body": {"sedac": {"dense": True}}},
        {"name": "own", "gate": "of the server"},
    ]
    matrix.write_text(json.dumps({"experiments": ways, "quality": {"samples": 0}}))
    result = bench(sedac, tmp_path, "--url", server.url("gated"), "--matrix", matrix)
    assert (result.code, result.err) == (0, "")
    assert {body.get("sedac", {}).get("dense") for body in server.bodies} == {True, None}
    dense, own = document(tmp_path)["configurations"]
    assert own["summary"]["speedup"]
    # As the server counts them, each run its own, though they are published a second late.
    assert (dense["summary"]["skip_ratio"], own["summary"]["skip_ratio"]) == (0.0, pytest.approx(0.25))
