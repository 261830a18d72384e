"""Servers that must not come up as if nothing were wrong. Each start takes half a minute."""

from __future__ import annotations

import os
import signal

import pytest
from test_serving import Server, model  # noqa: F401

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


@pytest.fixture
def serve(tmp_path):
    """Start a server; it is gone when the test is over, however that went."""
    started = []

    def start(environment=None, **options):
        started.append(Server(tmp_path / "log", environment, **options))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.stop()


def test_a_plugin_that_silently_did_nothing_is_an_error(model, serve):  # noqa: F811
    """vLLM itself comes up, healthy and dense."""
    server = serve({"VLLM_PLUGINS": "others"}, model=str(model[1]), gate="always:2")
    assert server.process.wait(300) == 3
    log = server.log.read_text()
    assert "the plugin was not loaded" in log
    assert "Application startup complete" in log


def test_what_does_not_fit_the_model_is_refused_before_weights_load(model, serve):  # noqa: F811
    server = serve(model=str(model[1]), gate="always:9")
    assert server.process.wait(300) == 3
    log = server.log.read_text()
    assert "vLLM did not start" in log
    assert "always:9: the model has layers 0..3" in log
    assert "Loading weights" not in log


def test_a_worker_that_dies_ends_the_server(model, serve):  # noqa: F811
    server = serve(model=str(model[1]), gate="always:2")
    worker = server.ready()["workers"][0]
    os.kill(worker["pid"], signal.SIGKILL)
    assert server.process.wait(120) == 3
    assert "vLLM stopped by itself" in server.log.read_text()


@pytest.mark.parametrize("option", ["--max-queue 3", "--request-timeout 5", "--device cuda", "--load-in-4bit"])
def test_options_that_vllm_would_pass_over_are_refused(model, sedac, option):  # noqa: F811
    result = sedac("serve", "--backend", "vllm", "--model", model[1], "--port", 0, *option.split())
    assert result.code == 2
    assert option.split()[0] in result.err
    assert "-- --max-num-seqs" in result.err
