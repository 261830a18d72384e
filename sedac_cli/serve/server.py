"""Listen, serve, and stop in order: running requests end, new ones are refused, and the process leaves with 0.

serve(app, bind("127.0.0.1", 8000), limits, ready=print, abort=engine.abort)
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from sedac_cli.errors import InputError
from sedac_cli.serve.limits import Limits

FORCE = 30
"""Seconds after the grace until connections are closed by force: a batch has ended by then, if it ever will."""


class Protocol(H11Protocol):
    """Closes a connection whose first request has no complete head in time, however slowly its bytes drip in."""

    head_timeout = Limits.head_timeout

    def connection_made(self, transport: Any) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(self.head_timeout, self._give_up)

    def _give_up(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's, but a stop that was asked for is no failure: no signal is raised again after it."""

    def __init__(self, config: uvicorn.Config, grace: float, ready: Callable[[], None], abort: Callable[[], None]):
        super().__init__(config)
        self.grace, self.ready, self.abort = grace, ready, abort

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """What runs may end by itself; after the grace it is ended, and its clients are told."""
        timer = asyncio.get_running_loop().call_later(self.grace, self.abort)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def bind(host: str, port: int) -> socket.socket:
    """The listening socket, before the model is loaded: a taken port is known at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise InputError(f"port {port} of {host} is taken", hint="--port 8001") from None
        raise InputError(f"cannot listen on {host}:{port}: {getattr(error, 'strerror', error)}") from None
    return listener


def make_server(app: ASGIApp, limits: Limits, ready: Callable[[], None], abort: Callable[[], None]) -> Server:
    """`ready` is called when requests are taken, `abort` when running ones must end."""
    protocol = type("LimitedProtocol", (Protocol,), {"head_timeout": limits.head_timeout})
    config = uvicorn.Config(
        app, http=protocol, ws="none", log_config=None, log_level="warning", access_log=False, server_header=False,
        limit_concurrency=limits.max_connections, timeout_keep_alive=30, backlog=512,
        timeout_graceful_shutdown=round(limits.grace) + FORCE,
    )  # fmt: skip
    return Server(config, limits.grace, ready, abort)


def serve(
    app: ASGIApp, listener: socket.socket, limits: Limits, ready: Callable[[], None], abort: Callable[[], None]
) -> None:
    logging.getLogger("uvicorn.error").addHandler(logging.StreamHandler())
    make_server(app, limits, ready, abort).run(sockets=[listener])
