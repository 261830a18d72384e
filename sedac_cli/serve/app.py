"""The routes of the server, put together; every error in one form.

app = make_app(make_served(loaded, plan, "always:14", Limits()), api_key=None)
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from functools import partial

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from sedac_cli import __version__
from sedac_cli.serve.call import ClientGoneError
from sedac_cli.serve.errors import ApiError
from sedac_cli.serve.guard import Guard
from sedac_cli.serve.metrics import CONTENT_TYPE
from sedac_cli.serve.native import native_routes
from sedac_cli.serve.openai import openai_routes
from sedac_cli.serve.state import Served


def make_app(served: Served, api_key: str | None = None) -> Guard:
    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        served.engine.start()
        yield
        served.engine.close()
        served.prompts.close()

    # The pages that show the API would be fetched from elsewhere; /openapi.json is here.
    app = FastAPI(title="sedac", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.include_router(openai_routes(served))
    app.include_router(native_routes(served))
    add_health(app, served)
    add_error_handlers(app, served)
    return Guard(app, served.limits, api_key, partial(count_refused, served))


def add_health(app: FastAPI, served: Served) -> None:
    @app.get("/health")
    async def health() -> Response:
        engine = served.engine
        document = {
            "status": "ok" if engine.alive else "down", "model": served.name, "gate": served.gate,
            "waiting": len(engine.queue), "running": len(engine.running), "version": __version__,
        }  # fmt: skip
        return JSONResponse(document, 200 if engine.alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(served.metrics.text(), media_type=CONTENT_TYPE)


def add_error_handlers(app: FastAPI, served: Served) -> None:
    def answer(error: ApiError, request: Request) -> JSONResponse:
        if 400 <= error.status < 500 and error.status != 429 and request.method == "POST":
            count_refused(served, request.url.path, error.status)
        return JSONResponse(error.document, error.status, error.headers)

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        return answer(error, request)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        # Of a field that takes several forms, the form that was meant is the one whose kind fits.
        first = min(error.errors(), key=lambda e: str(e["type"]).endswith("_type"))
        where = ".".join(str(part) for part in first["loc"] if str(part).isidentifier() or isinstance(part, int))
        where = where.removeprefix("body").removeprefix(".").removesuffix(".str")
        text = str(first["msg"]).removeprefix("Value error, ")
        if first["type"] == "json_invalid":
            where, text = "", f"the body is not JSON: {first.get('ctx', {}).get('error', '')}"
        return answer(ApiError(400, f"{where}: {text}" if where else text, param=where or None), request)

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> JSONResponse:
        text = str(error.detail)
        if error.status_code in (404, 405):
            text = f"{request.method} {request.url.path}: {text}; /openapi.json lists what is here"
        return answer(ApiError(error.status_code, text, headers=dict(error.headers or {})), request)

    @app.exception_handler(ClientGoneError)
    async def gone(request: Request, error: ClientGoneError) -> Response:
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def crashed(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(ApiError(500, f"internal error: {type(error).__name__}").document, 500)


ENDPOINTS = {"/v1/completions": "completions", "/v1/chat/completions": "chat", "/generate": "generate",
             "/batch_generate": "batch_generate"}  # fmt: skip


def count_refused(served: Served, path: str, status: int) -> None:
    """Once per request that never became work."""
    outcome = "unauthorized" if status == 401 else "invalid"
    served.metrics.requests.labels(ENDPOINTS.get(path, "other"), outcome).inc()
