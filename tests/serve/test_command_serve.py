"""`sedac serve` as a process: it says where it listens, refuses what cannot work, and stops in order."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time

import httpx2
import openai
import pytest
from conftest import python


@pytest.fixture
def process(chatty_folder):
    started = python(
        "-m", "sedac_cli", "serve", "--model", chatty_folder, "--gate", "always:1", "--port", 0, "--json",
        "--served-name", "tiny", env={"SEDAC_SERVE_API_KEY": "secret"},
    )  # fmt: skip
    document = ""
    while not document.rstrip().endswith("}"):
        line = started.stdout.readline()
        assert line, started.stderr.read()
        document += line
    yield started, json.loads(document)["url"]
    started.kill()
    started.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_and_stops_when_told(process, number):
    started, url = process
    client = openai.OpenAI(base_url=url + "/v1", api_key="secret", max_retries=0)
    assert url.startswith("http://127.0.0.1:")
    assert client.completions.create(model="tiny", prompt="the sea", max_tokens=3).sedac["skip_ratio"] > 0
    answers = []

    def ask():
        answers.append(
            client.completions.create(model="tiny", prompt="x", max_tokens=150, extra_body={"ignore_eos": True})
        )

    asking = threading.Thread(target=ask)
    asking.start()
    headers = {"Authorization": "Bearer secret"}
    while "sedac_running 1.0" not in httpx2.get(url + "/metrics", headers=headers).text:
        time.sleep(0.01)
    started.send_signal(number)
    asking.join(30)
    assert answers[0].usage.completion_tokens == 150  # what ran was finished
    assert started.wait(30) == 0
    assert "stopped" in started.stderr.read()
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(url + "/health")


def test_what_runs_too_long_is_ended_after_the_grace(chatty_folder):
    started = python("-m", "sedac_cli", "serve", "--model", chatty_folder, "--port", 0, "--json", "--grace", 1,
                     "--max-new-tokens", 4000)  # fmt: skip
    try:
        document = ""
        while not document.rstrip().endswith("}"):
            document += started.stdout.readline()
        url = json.loads(document)["url"]
        ask = {"prompt": "x", "max_new_tokens": 4000, "ignore_eos": True}
        answers = []
        asking = threading.Thread(target=lambda: answers.append(httpx2.post(url + "/generate", json=ask, timeout=60)))
        asking.start()
        while "sedac_running 1.0" not in httpx2.get(url + "/metrics").text:
            time.sleep(0.01)
        began = time.monotonic()
        started.send_signal(signal.SIGTERM)
        assert started.wait(30) == 0
        assert time.monotonic() - began < 10
        asking.join(10)
        assert answers[0].status_code == 503
        assert "Traceback" not in started.stderr.read()
    finally:
        started.kill()
        started.wait()


def test_a_taken_port_is_known_before_the_model_loads(sedac):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = sedac("serve", "--port", taken.getsockname()[1], "--model", "/no/such/model")
    assert result.code == 3
    assert "is taken" in result.err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--api-key", " "], 2, "empty"),
        (["--host", "no.such.host.invalid"], 3, "cannot listen"),
        (["--gate", "allways:3"], 2, "always"),
        (["--max-queue", "0"], 2, ""),
        (["--shrink", "--backend", "eager"], 2, "--shrink is about the caches of --backend graph"),
        (["--max-length", "100"], 2, "--max-length is about"),
        (["--max-length", "8192", "--backend", "eager"], 2, "--max-length is about"),
        (["--backend", "graph", "--max-batch", "8"], 2, "--max-batch is about sequences that run together"),
        (["--backend", "graph", "--batch-wait", "0.005"], 2, "--batch-wait is about sequences that run together"),
        (["--backend", "vllm", "--max-queue", "64"], 2, "--max-queue is not for vLLM"),
        (["--backend", "eagr"], 2, "Did you mean 'eager'?"),
    ],
)
def test_options_that_cannot_work(sedac, arguments, code, says):
    result = sedac("serve", "--port", 0, *arguments)
    assert result.code == code
    assert says in result.err
