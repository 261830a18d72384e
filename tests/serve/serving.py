"""A real server on a real port in a thread of this process, and its counters as Prometheus reads them."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from dataclasses import dataclass, replace

import httpx2
import openai
from prometheus_client.parser import text_string_to_metric_families

from sedac_cli.gates.base import Guards
from sedac_cli.runtime.plan import make_plan
from sedac_cli.serve.app import make_app
from sedac_cli.serve.limits import Limits
from sedac_cli.serve.server import bind, make_server
from sedac_cli.serve.state import Served, make_served

LIMITS = Limits(max_new_tokens=4000, head_timeout=0.5, body_timeout=0.5, max_body=100_000, grace=1)


@dataclass
class Running:
    url: str
    port: int
    served: Served

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key=key, max_retries=0, timeout=60)

    def post(self, path: str, **more):
        return httpx2.post(self.url + path, timeout=60, **more)

    def counters(self) -> dict[str, float]:
        """`name` or `name{label}` -> value."""
        found = {}
        for family in text_string_to_metric_families(httpx2.get(self.url + "/metrics").text):
            for sample in family.samples:
                labels = ",".join(sample.labels.values())
                found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
        return found

    def wait(self, what, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.01)

    def quiet(self) -> bool:
        found = self.counters()
        return found["sedac_running"] == found["sedac_waiting"] == found["sedac_open_requests"] == 0


@contextlib.contextmanager
def serving(
    loaded,
    gate="always:2",
    key=None,
    sinks=2,
    backend=None,
    send_buffer=None,
    context=None,
    top_logprobs=True,
    **limits,
):
    plan = make_plan(gate, loaded.decoder, guards=Guards(sinks=sinks))
    limits = replace(LIMITS, **limits)
    served = make_served(loaded, plan, gate, limits, "tiny", backend, context, top_logprobs)
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    if send_buffer:  # else the system takes megabytes from us before a client's silence is felt
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    up = threading.Event()
    server = make_server(make_app(served, key), limits, up.set, served.engine.abort)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        assert up.wait(20)
        yield Running(f"http://127.0.0.1:{port}", port, served)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
        assert not served.engine.thread.is_alive()
