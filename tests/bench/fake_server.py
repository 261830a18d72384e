"""A small OpenAI-compatible server that really listens, and misbehaves in the ways real ones do: one way per path.

with Server() as server: server.url("slow")     # http://127.0.0.1:PORT/slow/v1
"""

from __future__ import annotations

import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODEL, CONTEXT = "fake", 200


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server  # type: ignore[assignment]

    def log_message(self, *args):
        pass

    @property
    def way(self) -> str:
        return self.path.split("/")[1]

    def do_GET(self):
        if self.path == "/gated/metrics":
            now = time.monotonic()  # published a second late
            known = [body for body, at in zip(self.server.bodies, self.server.arrived, strict=True) if at < now - 1]
            count, gated = len(known), sum("sedac" not in body for body in known)
            text = f'# HELP x\nsedac_mlps_total {count * 80}.0\nsedac_mlps_skipped_total {{a="1"}} {gated * 20}.0\n'
            return self.reply(text.replace("total {", "total{").encode())
        if self.path.endswith("/metrics") or self.path == "/bare/models":
            return self.reply(b"not found", 404)
        if self.way == "nonsense":
            return self.reply(b"<html>hello</html>")
        row = {"id": MODEL} | ({"max_model_len": CONTEXT} if self.way == "short" else {})
        self.reply(json.dumps({"data": [row]}).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.arrived.append(time.monotonic())
            number = len(self.server.bodies)
        if body.get("echo"):
            return self.logprobs(body)
        way = self.way
        if way == "error" or (way == "flaky" and number % 3 == 0):
            return self.reply(json.dumps({"error": {"message": "out of luck"}}).encode(), 500)
        if way == "context":
            text = f"This model's maximum context length is {CONTEXT} tokens."
            return self.reply(json.dumps({"detail": text}).encode(), 400)
        if way == "page":
            return self.reply(b"<html>bad gateway</html>", 502)
        if way == "whole":  # ignores that a stream was asked for
            return self.reply(json.dumps({"choices": [{"text": "hello"}]}).encode())
        if way == "dies" and number > self.server.dies_after:
            threading.Thread(target=self.server.shutdown).start()
            self.server.socket.close()
            self.close_connection = True
            return None
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        self.stream(body, number)

    def stream(self, body, number):
        way, count = self.way, body["max_tokens"]
        with self.server.lock:
            self.server.active += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.active)
        time.sleep(self.server.first)
        with self.server.lock:  # before the first token: a client that has its answer may ask again at once
            self.server.active -= 1
        for index in range(count):
            if way == "hangs" and index == 2:
                time.sleep(1.5)
            if way == "cut" and index == 2:
                return
            if way == "badjson" and index == 2:
                self.send(b'data: {"choices": [{"te\n\n')
                return
            if way == "fails" and index == 2:
                return self.event({"error": {"message": "engine died"}})
            piece = {"delta": {"content": " word"}} if "messages" in body else {"text": " word"}
            self.event({"choices": [piece | {"finish_reason": "length" if index == count - 1 else None}]})
            time.sleep(self.server.between)
        self.send(b": a comment\n\n")
        if body.get("stream_options", {}).get("include_usage"):
            self.event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": count}})
        self.send(b"data: [DONE]\n\n")

    def logprobs(self, body):
        words = body["prompt"].split()
        found = {"choices": [{"text": body["prompt"]}], "usage": {"prompt_tokens": len(words)}}
        if self.way != "nologprobs":
            each = -2.0 - (math.log(1.5) if self.way == "worse" else 0.0)
            found["choices"][0]["logprobs"] = {"token_logprobs": [None, *[each] * len(words)]}
            if self.way != "notops":  # the worse server would say something else at every fourth place
                best = ["y" if self.way == "worse" and n % 4 == 0 else "x" for n in range(len(words))]
                tops = [{"z": -9.0, word: -0.5} for word in best]
                found["choices"][0]["logprobs"]["top_logprobs"] = [None, *tops]
        self.reply(json.dumps(found).encode())

    def event(self, document):
        self.send(b"data: " + json.dumps(document).encode() + b"\n\n")

    def send(self, data: bytes):
        self.wfile.write(data)
        self.wfile.flush()

    def reply(self, data: bytes, status: int = 200):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # more at once than the default would let in

    def __init__(self, first: float = 0.02, between: float = 0.01, dies_after: int = 3):
        super().__init__(("127.0.0.1", 0), Handler)
        self.first, self.between, self.dies_after = first, between, dies_after
        self.bodies: list[dict] = []
        self.arrived: list[float] = []
        self.active = self.most_at_once = 0
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def handle_error(self, request, client_address):
        pass  # clients that hang up are part of the tests

    def url(self, way: str = "ok") -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{way}/v1"

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()
