"""Load on an OpenAI-compatible server: so many requests at once, or so many a second; every request leaves a record.

Always true: a request that fails is a record with its reason, and the others go on; times are taken where tokens arrive.

    with LoadClient(Endpoint("http://127.0.0.1:8000/v1", "tiny")) as client:
        done = client.load(prompts, new_tokens=32, at_once=4)
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import time
from dataclasses import dataclass, field
from typing import Any

from sedac_cli.bench.metrics import Request, gaps
from sedac_cli.errors import InputError

SHOWN = 160  # characters of a server's own words


@dataclass(frozen=True)
class Endpoint:
    base_url: str
    model: str
    chat: bool = False
    extra_body: dict[str, Any] = field(default_factory=dict)
    timeout: float = 120.0


@dataclass(frozen=True)
class Answer:
    request: Request
    gaps: list[float]
    """Seconds between what arrived; a piece may hold several tokens."""


class LoadClient:
    """One connection pool and one event loop for as long as it is open."""

    def __init__(self, endpoint: Endpoint):
        self.endpoint = endpoint
        self._http = http_library()
        self._runner = asyncio.Runner()
        key = os.environ.get("OPENAI_API_KEY")
        self._client = self._http.AsyncClient(
            base_url=endpoint.base_url.rstrip("/") + "/",
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=endpoint.timeout,
            limits=self._http.Limits(max_connections=None, max_keepalive_connections=None),
        )

    def __enter__(self) -> LoadClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._runner.run(self._client.aclose())
        self._runner.close()

    def load(
        self,
        prompts: list[str],
        new_tokens: int,
        *,
        at_once: int | None = None,
        rate: float | None = None,
        seed: int = 0,
    ) -> list[Answer]:
        """All prompts, at most `at_once` under way; or started at random times, `rate` a second on average, however many
        that puts under way."""
        work = (
            self._at_rate(prompts, new_tokens, rate, seed) if rate else self._at_once(prompts, new_tokens, at_once or 1)
        )
        return self._runner.run(work)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """One request that is no load; what goes wrong is an InputError."""
        return self._runner.run(self._whole("POST", path, body))

    def get(self, path: str) -> dict[str, Any]:
        return self._runner.run(self._whole("GET", path, None))

    def skips(self) -> tuple[float, float] | None:
        """(MLPs a dense model would have run, MLPs that were not run) since the server started, where it counts them."""
        root = self.endpoint.base_url.rstrip("/").removesuffix("/v1")
        try:
            response = self._runner.run(self._client.get(root + "/metrics"))
        except self._http.HTTPError:
            return None
        mlps, skipped = (_counter(response.text, f"sedac_mlps{part}_total") for part in ("", "_skipped"))
        return None if response.status_code >= 400 or mlps is None else (mlps, skipped or 0.0)

    async def _at_once(self, prompts: list[str], new_tokens: int, at_once: int) -> list[Answer]:
        answers: list[Answer | None] = [None] * len(prompts)
        waiting = iter(range(len(prompts)))
        began = time.perf_counter()

        async def worker() -> None:
            for index in waiting:
                answers[index] = await self._ask(prompts[index], new_tokens, began)

        await asyncio.gather(*(worker() for _ in range(min(at_once, len(prompts)))))
        return [answer for answer in answers if answer is not None]

    async def _at_rate(self, prompts: list[str], new_tokens: int, rate: float, seed: int) -> list[Answer]:
        rng = random.Random(seed)
        began = time.perf_counter()
        tasks, due = [], 0.0
        for prompt in prompts:
            await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
            tasks.append(asyncio.create_task(self._ask(prompt, new_tokens, began)))
            due += rng.expovariate(rate)
        return list(await asyncio.gather(*tasks))

    async def _ask(self, prompt: str, new_tokens: int, began: float) -> Answer:
        sent = time.perf_counter()
        stream = _Stream()
        error: str | None = None
        try:
            async with asyncio.timeout(self.endpoint.timeout):
                await self._read_stream(stream, prompt, new_tokens)
        except _FaultError as fault:
            error = str(fault)
        except (TimeoutError, self._http.TimeoutException):
            error = f"no answer within {self.endpoint.timeout:g} s"
        except self._http.HTTPError as fault:
            error = _transport(self._http, fault)
        ended = time.perf_counter()
        if error is not None and stream.times:
            error += " (in mid-answer)"
        times = stream.times
        request = Request(
            sent=sent - began,
            prompt_tokens=stream.prompt_tokens or 0,
            new_tokens=len(times) if stream.new_tokens is None else stream.new_tokens,
            ttft=times[0] - sent if times else None,
            latency=(times[-1] if times and error is None else ended) - sent,
            error=error,
        )
        return Answer(request, gaps(times))

    async def _read_stream(self, stream: _Stream, prompt: str, new_tokens: int) -> None:
        chat = self.endpoint.chat
        asked = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        body = {
            "model": self.endpoint.model, **asked, "max_tokens": new_tokens, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}, **self.endpoint.extra_body,
        }  # fmt: skip
        path = "chat/completions" if chat else "completions"
        async with self._client.stream("POST", path, json=body) as response:
            if response.status_code >= 400:
                raise _FaultError(_refusal(response.status_code, await response.aread()))
            async for line in response.aiter_lines():
                if stream.take(line, time.perf_counter()):
                    break
        if not stream.finished:
            raise _FaultError("the stream ended before the answer did")

    async def _whole(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        where = f"{self.endpoint.base_url}/{path}"
        try:
            response = await self._client.request(method, path, json=body)
            if response.status_code >= 400:
                said = _refusal(response.status_code, response.content)
                if response.status_code == 404 and not self.endpoint.base_url.rstrip("/").endswith("/v1"):
                    said += " (most servers want the URL to end in /v1)"
                raise InputError(f"{where}: {said}")
            found = json.loads(response.content)
        except self._http.TimeoutException:
            raise InputError(f"{where}: no answer within {self.endpoint.timeout:g} s") from None
        except (self._http.HTTPError, self._http.InvalidURL) as fault:
            raise InputError(f"{where}: {_transport(self._http, fault)}", hint="is the server up? --url") from None
        except ValueError:
            raise InputError(f"{where} answered something that is not JSON: {_short(response.content)}") from None
        if not isinstance(found, dict):
            raise InputError(f"{where} answered {type(found).__name__}, expected an object")
        return found


class _FaultError(Exception):
    """What is wrong with one answer."""


class _Stream:
    """Server-sent events of one answer."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.prompt_tokens: int | None = None
        self.new_tokens: int | None = None
        self.finished = False

    def take(self, line: str, now: float) -> bool:
        """Whether that was the last line. Comments and empty lines are nothing."""
        if not line.startswith("data:"):
            if line.lstrip().startswith(("{", "<")):
                raise _FaultError(f"not a stream of events: {_short(line)}")
            return False
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            self.finished = True
            return True
        try:
            event = json.loads(data)
        except ValueError:
            raise _FaultError(f"an event that is not JSON: {_short(data)}") from None
        if not isinstance(event, dict):
            raise _FaultError(f"an event that is no object: {_short(data)}")
        if event.get("error"):
            raise _FaultError(_words(event))
        usage = event.get("usage")
        if isinstance(usage, dict):
            self.prompt_tokens, self.new_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
        for choice in event.get("choices") or []:
            if not isinstance(choice, dict):
                raise _FaultError(f"a choice that is no object: {_short(data)}")
            if choice.get("text") or (choice.get("delta") or {}).get("content"):
                self.times.append(now)
            self.finished = self.finished or choice.get("finish_reason") is not None
        return False


def _counter(text: str, name: str) -> float | None:
    """The sum of a Prometheus counter over its labels."""
    found = [line.rsplit(" ", 1) for line in text.splitlines() if re.match(rf"{name}[ {{]", line)]
    try:
        return sum(float(value) for _, value in found) if found else None
    except ValueError:
        return None


def http_library() -> Any:
    """What huggingface_hub brings: httpx2, or httpx of the same interface in older ones."""
    try:
        import httpx2

        return httpx2
    except ImportError:
        pass
    try:
        import httpx

        return httpx
    except ImportError:
        raise InputError("no HTTP client is installed", hint="pip install httpx2") from None


def _transport(http: Any, fault: Exception) -> str:
    if isinstance(fault, http.ConnectError):
        return "cannot connect"
    if isinstance(fault, (http.RemoteProtocolError, http.ReadError, http.WriteError)):
        return "the connection broke"
    return f"{type(fault).__name__}: {fault}"


def _refusal(status: int, content: bytes) -> str:
    try:
        return f"HTTP {status}: {_words(json.loads(content))}"
    except ValueError:
        return f"HTTP {status}: {_short(content)}"


def _words(document: Any) -> str:
    """The message of an error in any of the forms servers use."""
    found = document.get("error", document.get("detail", document)) if isinstance(document, dict) else document
    if isinstance(found, dict):
        found = found.get("message", found)
    return _short(found if isinstance(found, str) else json.dumps(found))


def _short(text: str | bytes) -> str:
    text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
