"""One thread that owns the model: takes rows from a bounded queue, runs them in small batches, reports token by token.

Always true: every job is answered exactly once (`Finished` or `Failed`), in whatever way it ends; first come, first
served; a job nobody waits for is dropped at its next token. Rows in a batch have their own sampling and lengths (see
`runtime.stream`), so any rows can share one; only memory limits who joins.

    engine = Engine(partial(stream, loaded, plan), tokenizer, Limits(), Metrics(28)); engine.start()
    engine.submit([Job(Row(prompt_ids), deliver=print)])
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sedac_cli.runtime.stream import OnPrompt, OnToken, Row, RowCounts, StreamToken
from sedac_cli.runtime.text import TextStream
from sedac_cli.serve.errors import ApiError, QueueFullError, failed
from sedac_cli.serve.limits import Limits
from sedac_cli.serve.metrics import Metrics

log = logging.getLogger("sedac")


class Backend(Protocol):
    """What runs a batch: `runtime.stream.stream` on a loaded model, or any engine with the same contract."""

    def __call__(self, rows: Sequence[Row], on_token: OnToken, on_prompt: OnPrompt) -> Any: ...


@dataclass(frozen=True)
class Piece:
    """A token, and the text that has become certain with it (often that of earlier tokens, sometimes none)."""

    text: str
    token: StreamToken


@dataclass(frozen=True)
class Finished:
    reason: str
    counts: RowCounts
    seconds: float


@dataclass(frozen=True)
class Failed:
    error: ApiError


Event = Piece | Finished | Failed


def cancelled() -> ApiError:
    return ApiError(503, "the request was cancelled", code="cancelled")


def stopping() -> ApiError:
    return ApiError(503, "the server is stopping", code="stopping", headers={"Retry-After": "5"})


@dataclass(eq=False)
class Job:
    """One row on its way. `deliver` is called in the engine's thread."""

    row: Row
    deliver: Callable[[Event], None]
    stop: tuple[str, ...] = ()
    cancelled: bool = False
    arrived: float = field(default_factory=time.monotonic)
    text: TextStream | None = None
    counts: RowCounts | None = None
    ended: bool = False

    def end(self, event: Finished | Failed) -> None:
        if not self.ended:
            self.ended = True
            self.deliver(event)


class Engine:
    def __init__(self, backend: Backend, tokenizer: Any, limits: Limits, metrics: Metrics):
        self.backend, self.tokenizer, self.limits, self.metrics = backend, tokenizer, limits, metrics
        self.queue: deque[Job] = deque()
        self.running: list[Job] = []
        self.changed = threading.Condition()
        self.closing = False
        self.batch_seconds = 1.0
        self.thread = threading.Thread(target=self._work, name="sedac-engine", daemon=True)
        metrics.watch(lambda: len(self.queue), lambda: len(self.running))

    # Any thread -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self.thread.start()

    @property
    def alive(self) -> bool:
        return self.thread.is_alive() and not self.closing

    def submit(self, jobs: Sequence[Job]) -> None:
        """All of them or none."""
        with self.changed:
            if self.closing:
                raise stopping()
            if len(jobs) > self.limits.max_queue:
                raise ApiError(400, f"{len(jobs)} sequences in one request; this server takes {self.limits.max_queue}")
            if len(self.queue) + len(jobs) > self.limits.max_queue:
                raise QueueFullError(len(self.queue), self._retry_after())
            self.queue.extend(jobs)
            self.changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Nobody waits for these any more: they leave the queue at once, or the batch at their next token."""
        with self.changed:
            for job in jobs:
                job.cancelled = True
                if job in self.queue:
                    self.queue.remove(job)
                    job.end(Failed(cancelled()))

    def abort(self) -> None:
        """Take nothing more, end what runs at its next token, answer everybody."""
        with self.changed:
            self.closing = True
            for job in (*self.queue, *self.running):
                job.cancelled = True
            self.changed.notify()

    def close(self) -> None:
        self.abort()
        if self.thread.is_alive():
            self.thread.join(timeout=30)

    def _retry_after(self) -> int:
        ahead = 1 + len(self.queue) / self.limits.max_batch
        return max(1, min(60, math.ceil(ahead * self.batch_seconds)))

    # The engine's thread ----------------------------------------------------------------------------------------

    def _work(self) -> None:
        while batch := self._next_batch():
            began = time.monotonic()
            try:
                self._run(batch)
            except Exception as error:
                log.exception("a batch of %d failed", len(batch))
                for job in batch:
                    job.end(Failed(failed(error)))
            finally:
                self.running = []
            self.batch_seconds += 0.3 * (time.monotonic() - began - self.batch_seconds)

    def _next_batch(self) -> list[Job]:
        """Rows to run next, in order of arrival; none when the engine is to stop."""
        with self.changed:
            while True:
                while not self.queue and not self.closing:
                    self.changed.wait()
                if self.closing:
                    for job in self.queue:
                        job.end(Failed(stopping()))
                    self.queue.clear()
                    return []
                until = time.monotonic() + self.limits.batch_wait
                while len(self.queue) < self.limits.max_batch and not self.closing:
                    if not self.changed.wait(max(0.0, until - time.monotonic())):
                        break
                batch: list[Job] = []
                while self.queue and self._fits(batch, self.queue[0]):
                    batch.append(self.queue.popleft())
                if batch:
                    self.running = batch
                    return batch

    def _fits(self, batch: list[Job], job: Job) -> bool:
        if not batch:
            return True
        rows = [*(j.row for j in batch), job.row]
        longest = max(len(row.prompt) for row in rows) + max(row.max_new_tokens for row in rows)
        return len(rows) <= self.limits.max_batch and len(rows) * longest <= self.limits.max_batch_tokens

    def _run(self, batch: list[Job]) -> None:
        now = time.monotonic()
        self.metrics.batches.inc()
        for job in batch:
            job.text = TextStream(self.tokenizer, job.stop)
            self.metrics.waited.observe(now - job.arrived)
        self.backend(
            [job.row for job in batch],
            lambda token: self._heard(batch[token.row], token),
            lambda row, counts: self._prompt_read(batch[row], counts),
        )
        for job in batch:  # a backend that forgot somebody is a fault, but nobody may wait for ever
            job.end(Failed(ApiError(500, "generation ended early", code="engine_error")))

    def _prompt_read(self, job: Job, counts: RowCounts) -> None:
        job.counts = counts
        self.metrics.prompt_tokens.inc(counts.prompt_tokens)
        self.metrics.decided("prefill", counts.processed["prefill"], counts.skipped, counts.exits)

    def _heard(self, job: Job, token: StreamToken) -> bool:
        assert job.text is not None
        assert job.counts is not None
        self.metrics.new_tokens.inc()
        self.metrics.entropy.observe(token.entropy)
        if job.counts.new_tokens == 1:
            self.metrics.first.observe(time.monotonic() - job.arrived)
        else:
            exits = {token.exit_layer: 1} if token.exit_layer < job.counts.num_layers else {}
            self.metrics.decided("decode", 1, token.skipped, exits)
        if job.cancelled:
            job.end(Failed(stopping() if self.closing else cancelled()))
            return False
        piece = job.text.push(token.token)
        finish = "stop" if job.text.stopped else token.finish
        if finish is not None:
            piece += job.text.finish()
        job.deliver(Piece(piece, token))
        if finish is not None:
            job.end(Finished(finish, job.counts, time.monotonic() - job.arrived))
        return finish is None
