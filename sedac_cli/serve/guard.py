"""What stands between the network and the routes: who may come in, how large and how slow a request may be.

Pure ASGI, so that a body is never held twice and a client's hanging up reaches the routes.

    app = Guard(app, Limits(), api_key="secret")
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
from collections.abc import Callable, MutableMapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sedac_cli.serve.errors import ApiError
from sedac_cli.serve.limits import Limits

OPEN = ("/health",)
"""Paths that need no key."""
DRAIN = 64 * 2**20
"""Bytes of a body too large that are still read, so that its sender gets to hear why it was refused."""


class SlowClientError(Exception):
    """The client does not read."""


class Guard:
    def __init__(
        self, app: ASGIApp, limits: Limits, api_key: str | None = None, refused: Callable[[str, int], None] | None = None
    ):  # fmt: skip
        """`refused` hears the path and the status of every request that got no further than here."""
        self.app, self.limits, self.refused = app, limits, refused
        self.key = api_key.encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        try:
            # Who may not come in is heard out as well: closed on a client that still sends, a connection is reset, and
            # what was answered is lost with it.
            stranger = self._stranger(scope, headers)
            body = await self._read(scope, headers, receive, keep=stranger is None)
            if stranger is not None:
                raise stranger
        except ApiError as error:
            if self.refused is not None:
                self.refused(scope["path"], error.status)
            await refuse(send, error)
            return
        with contextlib.suppress(SlowClientError):
            await self.app(scope, _replay(body, receive), self._bounded(send))

    def _stranger(self, scope: Scope, headers: dict[bytes, bytes]) -> ApiError | None:
        if self.key is not None and scope["path"] not in OPEN:
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.key):
                return ApiError(
                    401, "missing or wrong API key: send 'Authorization: Bearer KEY'", code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
        return None

    async def _read(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, keep: bool) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_timeout):
                read, more = 0, True
                while more and read <= DRAIN:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the body broke off")
                    chunk, more = message.get("body", b""), message.get("more_body", False)
                    read += len(chunk)
                    if keep and read <= self.limits.max_body:
                        body += chunk
        except TimeoutError:
            raise ApiError(
                408, f"the body was not complete after {self.limits.body_timeout:g} s", code="body_timeout"
            ) from None
        if not keep:
            return b""
        if read > self.limits.max_body:
            raise ApiError(413, f"the body is larger than {self.limits.max_body} bytes", code="body_too_large")
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
            if kind != b"application/json":
                raise ApiError(415, "send the body as 'Content-Type: application/json'", code="content_type")
            try:
                body.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ApiError(400, f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
        return bytes(body)

    def _bounded(self, send: Send) -> Send:
        """A client that does not take what it is sent is given up after `send_timeout`."""

        async def bounded(message: MutableMapping[str, Any]) -> None:
            try:
                async with asyncio.timeout(self.limits.send_timeout):
                    await send(message)
            except TimeoutError:
                raise SlowClientError from None

        return bounded


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body that was read, then whatever follows: the client's hanging up."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


async def refuse(send: Send, error: ApiError) -> None:
    """Answer and hang up: the rest of the body, if any, will not be read."""
    payload = json.dumps(error.document).encode()
    headers = {"content-type": "application/json", "content-length": str(len(payload)), "connection": "close"}
    pairs = [(k.lower().encode(), v.encode()) for k, v in (headers | error.headers).items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": payload, "more_body": False})
