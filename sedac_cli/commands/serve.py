"""`sedac serve`: an OpenAI-compatible server with a gate in force."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sedac_cli.commands._common import option, sedac_command
from sedac_cli.config import ModelSpec
from sedac_cli.console import Output, on_interrupt
from sedac_cli.errors import InputError, UsageError, did_you_mean

if TYPE_CHECKING:
    from sedac_cli.models import LoadedModel
    from sedac_cli.runtime.graph.stream import GraphStream
    from sedac_cli.runtime.plan import Plan
    from sedac_cli.serve.limits import Limits

BACKENDS = ("auto", "vllm", "eager", "graph")
LOCAL = ("127.0.0.1", "localhost", "::1")
PLACES = 8192
"""Of the caches of --backend graph, unless told otherwise."""


@dataclass(frozen=True)
class Caches:
    """Of --backend graph. `places` None: not given."""

    places: int | None
    shrink: bool


@sedac_command(model=ModelSpec())
def serve(
    out: Output,
    seed: int,
    model: ModelSpec,
    gate: Annotated[
        str, typer.Option("--gate", help="never, always:14, cascade:sedac_data/thresholds.json, learned:FILE.pth@0.25.")
    ] = "never",
    vllm_options: Annotated[
        list[str] | None, typer.Argument(metavar="[-- VLLM OPTIONS]", help="Passed on to `vllm serve`.")
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            "--backend",
            help="vllm; eager; graph: CUDA graphs, one sequence at a time; auto: vllm where it is installed, else eager.",
        ),
    ] = "auto",
    host: Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option("--api-key", help="What clients must send; better by SEDAC_SERVE_API_KEY.")
    ] = None,
    served_name: Annotated[
        str | None, typer.Option("--served-name", help="What clients call the model; default: as --model names it.")
    ] = None,
    max_length: Annotated[
        int | None,
        option(
            "Limits", "--max-length", min=2, help=f"With --backend graph: positions of its cache; default {PLACES}."
        ),
    ] = None,
    shrink: Annotated[
        bool,
        option("Limits", "--shrink", help="If the GPU has no room for --max-length, halve it until there is."),
    ] = False,
    max_queue: Annotated[
        int | None, option("Limits", "--max-queue", min=1, help="Sequences that may wait, then 429; default 64.")
    ] = None,
    max_batch: Annotated[
        int | None, option("Limits", "--max-batch", min=1, help="Sequences that run together; default 8.")
    ] = None,
    batch_wait: Annotated[
        float | None,
        option(
            "Limits", "--batch-wait", min=0, max=10, help="Seconds a first sequence waits for company; default 0.005."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, option("Limits", "--max-new-tokens", min=1, help="Per sequence; default 2048.")
    ] = None,
    request_timeout: Annotated[
        float | None,
        option("Limits", "--request-timeout", min=0.1, help="Seconds from arrival to end; default 300."),
    ] = None,
    max_body: Annotated[
        float | None, option("Limits", "--max-body", min=0.001, help="Largest request, MB; default 4.")
    ] = None,
    grace: Annotated[
        float, option("Limits", "--grace", min=0, help="Seconds for running requests to end after Ctrl-C or SIGTERM.")
    ] = 10.0,
) -> None:
    """Serve a model with a gate in force: OpenAI's API, /generate, /batch_generate, /health and Prometheus' /metrics."""
    if api_key is not None and not api_key.strip():
        raise UsageError("--api-key is empty", hint="leave it out, or give a key")
    if backend not in BACKENDS:
        raise UsageError(
            f"--backend: '{backend}' is not known.{did_you_mean(backend, list(BACKENDS))}", hint=", ".join(BACKENDS)
        )
    if backend != "graph" and (shrink or max_length is not None):
        raise UsageError(
            f"{'--shrink' if shrink else '--max-length'} is about the caches of --backend graph, which does not serve here",
            hint="--backend graph, or leave it out; vLLM has -- --max-model-len",
        )
    if backend == "graph":
        refuse_company(max_batch, batch_wait)
    from sedac_cli.vllm import installed

    given: dict[str, Any] = {
        "max_queue": max_queue, "max_batch": max_batch, "batch_wait": batch_wait, "max_new_tokens": max_new_tokens,
        "request_timeout": request_timeout, "max_body": None if max_body is None else round(max_body * 1e6),
    }  # fmt: skip
    told = {name: value for name, value in given.items() if value is not None}
    if backend == "vllm" or (backend == "auto" and installed()):
        refuse_unheeded(model, [f"--{name.replace('_', '-')}" for name in told])
        serve_with_vllm(out, model, gate, seed, api_key, served_name, host, port, grace, tuple(vllm_options or ()))
        return
    if vllm_options:
        raise UsageError(f"{' '.join(vllm_options)}: options of vLLM, which does not serve here", hint="--backend vllm")
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(f"sedac serve needs {error.name}", hint="pip install 'sedac[serve]'") from None
    from sedac_cli.serve.limits import Limits
    from sedac_cli.serve.server import bind

    limits = replace(Limits(), grace=grace, **told)
    if backend == "graph":
        limits = replace(limits, max_batch=1)
    listener = bind(host, port)
    graphs = Caches(max_length, shrink) if backend == "graph" else None
    serve_here(out, model, gate, seed, api_key, served_name, listener, limits, graphs)


def refuse_company(max_batch: int | None, batch_wait: float | None) -> None:
    """With --backend graph a sequence runs alone."""
    for name, given in (("--max-batch", max_batch not in (None, 1)), ("--batch-wait", batch_wait is not None)):
        if given:
            raise UsageError(
                f"{name} is about sequences that run together; --backend graph runs one at a time",
                hint="--backend eager takes it",
            )


def refuse_unheeded(model: ModelSpec, limits: list[str]) -> None:
    """Options that vLLM's server would pass over in silence."""
    loading = {
        "--device": model.device != "auto",
        "--device-map": model.device_map,
        "--load-in-4bit": model.load_in_4bit,
    }
    for name in (*(name for name, given in loading.items() if given), *limits):
        raise UsageError(
            f"{name} is not for vLLM, which serves here",
            hint="options of `vllm serve` go behind --, such as -- --max-num-seqs 64; --backend eager takes this one",
        )


def serve_with_vllm(
    out: Output, model: ModelSpec, gate: str, seed: int, api_key: str | None, name: str | None, host: str, port: int, grace: float,
    arguments: tuple[str, ...],
) -> None:  # fmt: skip
    """vLLM's own server with the plugin on; limits and metrics are vLLM's."""
    from sedac_cli.models import resolve
    from sedac_cli.vllm.serving import Served, ServeOptions, serve_vllm

    if model.dtype != "auto":
        arguments = ("--dtype", model.dtype, *arguments)
    if model.revision:
        arguments = ("--revision", model.revision, *arguments)
    if model.trust_remote_code:
        arguments = ("--trust-remote-code", *arguments)
    path, _ = resolve(model.ref)
    options = ServeOptions(
        path,
        gate,
        settings={"seed": seed} if seed else {},
        host=host,
        port=port,
        api_key=api_key,
        served_name=name or model.ref,
        arguments=arguments,
        grace=grace,
    )

    def ready(served: Served) -> None:
        out.result(
            {
                "url": served.url,
                "model": name or model.ref,
                "gate": gate,
                "vllm": served.vllm,
                "workers": served.workers,
            }
        )
        workers = f"{len(served.workers)} worker{'s have' if len(served.workers) != 1 else ' has'} the gate"
        out.note(
            f"serving {name or model.ref} with gate {gate} on {served.url} (vLLM {served.vllm}, {workers}); Ctrl-C stops"
        )
        if host not in LOCAL and api_key is None:
            out.note("note: this address can be reached from other machines and there is no --api-key")

    on_interrupt(None)
    if code := serve_vllm(options, ready, out.note):
        raise typer.Exit(code)
    out.note("stopped")


def serve_here(
    out: Output, model: ModelSpec, gate: str, seed: int, api_key: str | None, name: str | None, listener: socket.socket,
    limits: Limits, graphs: Caches | None,
) -> None:  # fmt: skip
    """Serve with an engine of this process. `graphs`: with CUDA graphs."""
    from sedac_cli.models import load_model
    from sedac_cli.runtime.engines import require_engine
    from sedac_cli.runtime.plan import check_spec, make_plan
    from sedac_cli.serve.app import make_app
    from sedac_cli.serve.server import serve as run
    from sedac_cli.serve.state import make_served

    check_spec(gate)
    with backend_named():
        require_engine("graph" if graphs else "eager", model.device)
    loaded = load_model(model)
    plan = make_plan(gate, loaded.decoder, loaded.identity, seed=seed)
    if graphs:
        with backend_named():
            stream = graph_stream(out, loaded, plan, graphs)
        served = make_served(loaded, plan, gate, limits, name, stream, stream.max_length, top_logprobs=False)
    else:
        served = make_served(loaded, plan, gate, limits, name)
    engine = "graph engine" if graphs else "eager engine"
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def ready() -> None:
        out.result(
            {"url": url, "model": served.name, "gate": gate, "engine": engine.split()[0], "device": str(loaded.device)}
        )
        out.note(f"serving {served.name} with gate {gate} on {url} ({engine}, {loaded.device}); Ctrl-C stops")
        if host not in LOCAL and api_key is None:
            out.note("note: this address can be reached from other machines and there is no --api-key")

    on_interrupt(None)
    run(make_app(served, api_key), listener, limits, ready, served.engine.abort)
    out.note("stopped")


@contextlib.contextmanager
def backend_named() -> Iterator[None]:
    """What the engine refuses names its option as the other commands have it; here it is `--backend`."""
    try:
        yield
    except InputError as error:
        if "--engine eager" in (error.hint or ""):
            error.hint = "--backend eager runs any model anywhere"
        raise


def graph_stream(out: Output, loaded: LoadedModel, plan: Plan, caches: Caches) -> GraphStream:
    """Caches as long as the model's positions and the GPU's memory let them be; what was cut is said."""
    from sedac_cli.runtime.graph.stream import GraphStream
    from sedac_cli.runtime.stream import context_limit

    wanted = caches.places or PLACES
    length = min(wanted, context_limit(loaded) or wanted)
    stream = GraphStream.fitting(loaded, plan, length, caches.shrink)
    for note in stream.gated.notes:
        out.note(note)
    if caches.places is not None and length < caches.places:
        out.note(f"--max-length {caches.places} is more than the model's {length} positions: it is {length}")
    if stream.max_length < length:
        out.note(f"no room for caches of {length} tokens: --max-length is {stream.max_length}")
    return stream
