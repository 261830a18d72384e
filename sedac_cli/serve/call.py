"""One client's request on the event loop: its jobs, their events in order, and what happens when the client goes away.

async with Call(engine, jobs...) as call:
    async for index, event in call.events(): ...
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sedac_cli.runtime.stream import Row, StreamToken
from sedac_cli.serve.engine import Engine, Event, Failed, Finished, Job, Piece
from sedac_cli.serve.errors import ApiError

T = TypeVar("T")


class ClientGoneError(Exception):
    """Nobody is there to read the answer."""


@dataclass
class Choice:
    """What one row has given so far."""

    text: str = ""
    tokens: list[StreamToken] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finished: Finished | None = None


class Call:
    """Submitting may raise; afterwards `close` must be called, whatever happens, and settles how the request ended."""

    def __init__(self, engine: Engine, endpoint: str, rows: Sequence[Row], stop: tuple[str, ...]):
        self.engine, self.endpoint = engine, endpoint
        self.began = time.monotonic()
        self.arrived: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        self.jobs = [Job(row, self._deliverer(index), stop) for index, row in enumerate(rows)]
        self.left = len(self.jobs)
        self.outcome = "cancelled"
        self.closed = False
        try:
            engine.submit(self.jobs)
        except ApiError as error:
            engine.metrics.requests.labels(endpoint, "rejected" if error.status == 429 else "error").inc()
            raise
        engine.metrics.open.inc()

    def _deliverer(self, index: int) -> Callable[[Event], None]:
        def deliver(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody is left to tell
                self.loop.call_soon_threadsafe(self.arrived.put_nowait, (index, event))

        return deliver

    async def events(self) -> AsyncIterator[tuple[int, Piece | Finished]]:
        """Every event of every row until all have finished. Raises what failed, and a 504 when time is up."""
        limit = self.engine.limits.request_timeout
        while self.left:
            rest = self.began + limit - time.monotonic()
            try:
                async with asyncio.timeout(max(0.0, rest)):  # wait_for of 3.11 loses a cancellation when an event comes
                    index, event = await self.arrived.get()
            except TimeoutError:
                self.outcome = "timeout"
                raise ApiError(504, f"not done after {limit:g} s", code="timeout") from None
            if isinstance(event, Failed):
                self.outcome = "error"
                raise event.error
            if isinstance(event, Finished):
                self.left -= 1
                if not self.left:
                    self.outcome = "ok"
            yield index, event

    async def results(self) -> list[Choice]:
        found = [Choice() for _ in self.jobs]
        async for index, event in self.events():
            take(found[index], event)
        return found

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self.engine.cancel([job for job in self.jobs if not job.ended])
        metrics = self.engine.metrics
        metrics.open.dec()
        metrics.requests.labels(self.endpoint, self.outcome).inc()
        metrics.latency.labels(self.endpoint).observe(time.monotonic() - self.began)


def take(choice: Choice, event: Piece | Finished) -> None:
    if isinstance(event, Finished):
        choice.finished = event
    else:
        choice.text += event.text
        choice.pieces.append(event.text)
        choice.tokens.append(event.token)


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, unless the client hangs up first: then the work is cancelled."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def answer(request: Request, call: Call, build: Callable[[list[Choice]], dict[str, Any]]) -> dict[str, Any]:
    """Wait for all of it; give it up if the client does."""
    try:
        return build(await unless_gone(request.receive, call.results()))
    finally:
        call.close()


class EventStream(Response):
    """Server-sent events from an iterator of payloads; the call is closed however it ends."""

    media_type = "text/event-stream"

    def __init__(self, call: Call, payloads: AsyncIterator[str]):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.call, self.payloads = call, payloads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            with contextlib.suppress(ClientGoneError):
                await unless_gone(receive, self._send_all(send))
        finally:
            self.call.close()

    async def _send_all(self, send: Send) -> None:
        async for payload in self.payloads:
            await send({"type": "http.response.body", "body": f"data: {payload}\n\n".encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
