"""Clients that are rude, broken or gone: each gets a clear answer or is dropped, nothing is lost, and the server lives."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx2
import openai
import pytest
import torch
from serving import serving

from sedac_cli.models import load_model
from sedac_cli.runtime.plan import make_plan
from sedac_cli.runtime.stream import stream

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def loaded(chatty_folder):
    return load_model(str(chatty_folder))


@pytest.fixture(scope="module")
def server(loaded):
    with serving(loaded) as running:
        yield running
        lives(running)
        running.wait(running.quiet)


def lives(server):
    found = server.client().completions.create(model="tiny", prompt="x", max_tokens=2, extra_body={"ignore_eos": True})
    assert found.usage.completion_tokens == 2


def refused(server, body, path="/v1/completions", status=400):
    answer = server.post(path, json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"max_tokens": -1}, "greater than or equal to 1"),
        ({"max_tokens": 0}, "greater than or equal to 1"),
        ({"max_tokens": "many"}, "valid integer"),
        ({"max_tokens": 10**30}, "at most 4000"),
        ({"max_tokens": 5000}, "at most 4000"),
        ({"n": 0}, "greater than or equal to 1"),
        ({"n": 100}, "100 sequences"),
        ({"temperature": -1}, "greater than or equal to 0"),
        ({"top_p": 0}, "greater than 0"),
        ({"seed": 2**80}, "less than"),
        ({"prompt": ""}, "at least 1"),
        ({"prompt": []}, "at least 1"),
        ({"prompt": [[1, 2], []]}, "at least 1"),
        ({"prompt": [1, 265]}, "token id 265"),
        ({"prompt": [1, -5]}, "greater than or equal to 0"),
        ({"prompt": None}, "valid"),
        ({"prompt": "\ud800"}, "unicode"),
        ({"prompt": "the sea " * 2000}, "4096 positions"),
        ({"prompt": "the sea " * 500, "max_tokens": 3900}, "4096 positions"),
        ({"stop": ["a"] * 17}, "at most 16"),
        ({"temprature": 1}, "Extra inputs"),
        ({"logit_bias": {"5": 100}}, "'logit_bias' is not supported"),
        ({"presence_penalty": 0.5}, "'presence_penalty' is not supported"),
        ({"echo": True}, "'echo' is not supported"),
        ({"stream_options": {"include_usage": True}}, "goes with"),
        ({"sedac": {"skip": 1}}, "Extra inputs"),
    ],
)
def test_nonsense_is_refused_by_name(server, change, says):
    body = {"model": "tiny", "prompt": "the sea"} | change
    answer = server.post("/v1/completions", content=json.dumps(body).encode(), headers=JSON)
    assert answer.status_code == 400, answer.text
    assert says in answer.json()["error"]["message"]


def test_what_changes_nothing_is_taken(server):
    harmless = {"user": "me", "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "best_of": 1,
                "echo": False, "suffix": None, "metadata": {"a": "b"}}  # fmt: skip
    assert server.post("/v1/completions", json={"prompt": "x", "max_tokens": 1} | harmless).status_code == 200


def test_chat_nonsense(server):
    path = "/v1/chat/completions"
    refused(server, {"messages": []}, path)
    refused(server, {"messages": [{"role": "king", "content": "x"}]}, path)
    refused(server, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, path)
    refused(server, {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 3}, path)
    error = refused(server, {"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}, path)
    assert "'tools' is not supported" in error["message"]


def test_no_chat_template(tiny_folder):
    with serving(load_model(str(tiny_folder)), max_new_tokens=50) as running:
        error = refused(running, {"messages": [{"role": "user", "content": "x"}]}, "/v1/chat/completions")
        assert "no chat template" in error["message"]
        refused(running, {"prompt": "x", "chat": True}, "/generate")


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"", 400, ""),
        (b"{", 400, "not JSON"),
        (b"[1, 2]", 400, ""),
        (b"null", 400, ""),
        (b'{"prompt": "\xff\xfe"}', 400, "not UTF-8"),
        ('{"prompt": "x"}'.encode("utf-16"), 400, "not UTF-8"),
        (b'{"prompt": ' + b"[" * 40_000, 400, ""),
        (b'{"prompt": "x", "temperature": NaN}', 400, ""),
        (b'{"prompt": "x", "temperature": 1e999}', 400, ""),
        (b" " * 100_001, 413, "larger than 100000"),
    ],
)
def test_bodies_that_are_no_request(server, body, status, says):
    answer = server.post("/v1/completions", content=body, headers=JSON)
    assert answer.status_code == status, answer.text
    assert says in answer.json()["error"]["message"]


def test_a_huge_body_is_refused_without_being_kept(server):
    def drip():
        for _ in range(400):
            yield b"x" * 50_000  # 20 MB, and no length announced

    answer = server.post("/v1/completions", content=drip(), headers=JSON)
    assert answer.status_code == 413
    lives(server)


def test_other_content_types_paths_and_methods(server):
    assert (
        server.post("/generate", content=b'{"prompt": "x"}', headers={"Content-Type": "text/plain"}).status_code == 415
    )
    assert refused(server, {}, "/v1/nothing", 404)
    assert httpx2.get(server.url + "/generate").status_code == 405


def test_wrong_key(loaded):
    with serving(loaded, key="secret") as running:
        for key in ("wrong", "secret ", "sécret", ""):
            answer = httpx2.post(
                running.url + "/generate", json={"prompt": "x"}, headers={b"Authorization": f"Bearer {key}x".encode()}
            )
            assert answer.status_code == 401
        with pytest.raises(openai.AuthenticationError):
            running.client("wrong").models.list()
        assert httpx2.get(running.url + "/metrics").status_code == 401
        assert httpx2.get(running.url + "/health").status_code == 200
        found = running.client("secret").completions.create(model="tiny", prompt="x", max_tokens=1)
        assert found.usage.completion_tokens == 1


def test_a_flood_is_answered_429_and_nothing_is_lost(loaded):
    with serving(loaded, max_queue=3, max_batch=2) as running:

        def ask(number):
            return running.post(
                "/generate", json={"prompt": f"the sea {number}", "max_new_tokens": 8, "ignore_eos": True}
            )

        with ThreadPoolExecutor(40) as pool:
            answers = list(pool.map(ask, range(120)))
        codes = [a.status_code for a in answers]
        assert set(codes) == {200, 429}
        assert all(1 <= int(a.headers["Retry-After"]) <= 60 for a in answers if a.status_code == 429)
        assert all(a.json()["new_tokens"] == 8 for a in answers if a.status_code == 200)
        running.wait(running.quiet)
        counters = running.counters()
        assert counters["sedac_requests_total{generate,ok}"] == codes.count(200)
        assert counters["sedac_requests_total{generate,rejected}"] == codes.count(429)
        assert counters["sedac_generated_tokens_total"] == 8 * codes.count(200)


def connect(server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=10)


def test_half_open_connections_are_closed(server):
    silent = [connect(server) for _ in range(50)]
    slow = connect(server)
    slow.sendall(b"POST /generate HTTP/1.1\r\n")
    lives(server)
    began = time.monotonic()
    for one in silent:
        assert one.recv(1) == b""
    for _ in range(3):
        time.sleep(0.2)
        try:
            slow.sendall(b"x")
        except OSError:
            break
    assert slow.recv(1) == b""
    assert time.monotonic() - began < 8
    for one in (*silent, slow):
        one.close()


def test_a_body_that_never_comes(server):
    with connect(server) as one:
        one.sendall(
            b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
        )
        answer = one.recv(4096)
        assert answer.startswith(b"HTTP/1.1 408")
    lives(server)


def test_bytes_that_are_no_http(server):
    for junk in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", b"GET / HTTP/9.9\r\n\r\n", b"A" * 100_000):
        with connect(server) as one:
            one.sendall(junk)
            assert one.recv(100) == b"" or True
    lives(server)


LONG = {"prompt": "the sea", "max_tokens": 4000, "ignore_eos": True, "temperature": 0}


def test_hanging_up_ends_the_work(server):
    """4,000 tokens take many seconds; the row must be gone long before."""
    before = server.counters()
    with httpx2.stream("POST", server.url + "/v1/completions", json=LONG | {"stream": True}, timeout=30) as answer:
        for line in answer.iter_lines():
            if line.startswith("data:"):
                break
    server.wait(server.quiet, 5)
    after = server.counters()
    assert (
        after["sedac_requests_total{completions,cancelled}"]
        == before.get("sedac_requests_total{completions,cancelled}", 0) + 1
    )
    assert after["sedac_generated_tokens_total"] - before["sedac_generated_tokens_total"] < 2000

    whole = connect(server)
    body = json.dumps(LONG).encode()
    whole.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        + f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    server.wait(lambda: server.counters()["sedac_running"] == 1)
    whole.close()
    server.wait(server.quiet, 5)
    assert (
        server.counters()["sedac_requests_total{completions,cancelled}"]
        == before.get("sedac_requests_total{completions,cancelled}", 0) + 2
    )


def test_a_request_that_waits_can_be_given_up(loaded):
    with serving(loaded, max_batch=1) as running:
        with httpx2.stream("POST", running.url + "/v1/completions", json=LONG | {"stream": True}, timeout=30) as answer:
            lines = answer.iter_lines()
            next(lines)
            with pytest.raises(httpx2.ReadTimeout):
                httpx2.post(running.url + "/v1/completions", json=LONG, timeout=0.3)
            running.wait(lambda: running.counters()["sedac_waiting"] == 0)
        running.wait(running.quiet)
        assert running.counters()["sedac_prompt_tokens_total"] == len(loaded.tokenizer("the sea")["input_ids"])


def test_time_is_up(loaded):
    with serving(loaded, request_timeout=0.5) as running:
        assert refused(running, LONG, status=504)["code"] == "timeout"
        lines = running.post("/v1/completions", json=LONG | {"stream": True}).text.strip().split("\n\n")
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "timeout"
        assert lines[-1] == "data: [DONE]"
        running.wait(running.quiet, 5)
        assert running.counters()["sedac_requests_total{completions,timeout}"] == 2
        lives(running)


def test_a_client_that_does_not_read(loaded):
    with serving(loaded, send_timeout=0.5, send_buffer=4096) as running:
        with connect(running) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            body = json.dumps(LONG | {"stream": True, "n": 8, "logprobs": 5}).encode()
            one.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                + f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            running.wait(lambda: running.counters()["sedac_running"] == 4)
            running.wait(running.quiet, 60)
        lives(running)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [(RuntimeError("broken"), 500, "engine_error"), (torch.cuda.OutOfMemoryError("full"), 503, "out_of_memory")],
)
def test_a_failing_engine_says_so_and_goes_on(loaded, error, status, code):
    plan = make_plan("always:2", loaded.decoder)
    broken = threading.Event()

    def backend(rows, on_token, on_prompt):
        if broken.is_set():
            raise error
        return partial(stream, loaded, plan)(rows, on_token, on_prompt)

    with serving(loaded, backend=backend) as running:
        broken.set()
        assert refused(running, {"prompt": "x"}, "/generate", status)["code"] == code
        with pytest.raises(openai.InternalServerError):
            running.client().completions.create(model="tiny", prompt="x")
        broken.clear()
        lives(running)
        assert running.counters()["sedac_requests_total{generate,error}"] == 1


def test_rows_run_together_and_no_more_than_allowed(loaded):
    plan = make_plan("always:2", loaded.decoder)
    sizes = []

    def backend(rows, on_token, on_prompt):
        sizes.append(len(rows))
        return partial(stream, loaded, plan)(rows, on_token, on_prompt)

    with serving(loaded, backend=backend, max_batch=3, max_queue=20, max_batch_tokens=300) as running:
        running.post("/batch_generate", json={"prompts": ["the sea"] * 7, "max_new_tokens": 4})
        assert sizes == [3, 3, 1]
        running.post("/batch_generate", json={"prompts": ["the sea"] * 3, "max_new_tokens": 120})
        assert sizes[3:] == [2, 1]
        running.post("/generate", json={"prompt": "the sea", "max_new_tokens": 400})
        assert sizes[5:] == [1]
