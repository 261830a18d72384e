"""vLLM's own OpenAI server with a gate in force: started with everything set, checked for life in every worker, stopped cleanly.

Always true: it is never reported as ready unless every worker has said that the gate is in its model; whatever way this ends,
no process of the server is left behind.

    serve_vllm(ServeOptions("Qwen/Qwen2.5-7B-Instruct", gate="learned:sedac_gates.pth@0.25", arguments=("--max-model-len", "8192")))
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sedac_cli.errors import InputError, UsageError
from sedac_cli.vllm import handshake
from sedac_cli.vllm.patch_site import absolute_gate, find_site, require_artifacts
from sedac_cli.vllm.settings import KEY, read_settings

OPTION = "--additional-config"
POLL = 0.5
LATE = 10.0
"""Seconds between vLLM's first healthy answer and the last worker's report, which came before: file systems may lag."""


@dataclass(frozen=True)
class ServeOptions:
    model: str
    gate: str | None = "never"
    """None: the probes of `settings["probe_dir"]`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """More options by the names of `settings.Settings`."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    api_key: str | None = None
    served_name: str | None = None
    arguments: tuple[str, ...] = ()
    """Passed through to `vllm serve`."""
    control: bool = False
    """Let POST /collective_rpc change thresholds: vLLM's development routes, which must not be open to the world."""
    interpreter: str = sys.executable
    handshake_dir: Path | None = None
    """A folder that all machines see, where workers run on several; default: a temporary one."""
    start_seconds: float = 1800.0
    grace: float = 30.0


@dataclass(frozen=True)
class Served:
    """What runs, once it does."""

    url: str
    pid: int
    vllm: str
    workers: list[dict[str, Any]]
    """Their handshakes."""


def serve_vllm(
    options: ServeOptions, ready: Callable[[Served], None] | None = None, say: Callable[[str], None] | None = None
) -> int:
    """Serve until SIGTERM or Ctrl-C, then 0. An InputError tells why it did not come up, or that it died."""
    say = say or (lambda text: None)
    site = find_site(options.interpreter)
    site.require_plugin()
    port = free_port(options.host, options.port)
    command = command_of(options, port)
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sedac-serve-")))
        reports = options.handshake_dir or scratch / "handshakes"
        for folder in (reports, scratch / "metrics"):
            folder.mkdir(parents=True, exist_ok=True)
        if left := list(reports.glob("*.json")):
            raise InputError(f"{reports} holds {len(left)} reports of another run", hint="name an empty folder")
        stopping = stack.enter_context(stop_signals())
        server = stack.enter_context(
            running(command, environment_of(options, reports, scratch / "metrics"), options.grace)
        )
        say(f"vLLM {site.vllm} starts (process {server.pid})")
        url = f"http://{'[' + options.host + ']' if ':' in options.host else options.host}:{port}"
        if not wait_until_healthy(server, url, options.start_seconds, stopping):
            return 0
        workers = check_workers(reports)
        if ready is not None:
            ready(Served(url, server.pid, site.vllm, workers))
        while not stopping:
            with contextlib.suppress(subprocess.TimeoutExpired):
                raise InputError(f"vLLM stopped by itself with exit code {server.wait(POLL)}", hint="its log says why")
        say("stopping")
    return 0


def command_of(options: ServeOptions, port: int) -> list[str]:
    """The command line: what was passed through, and the settings in additional_config, where they enter the compile cache's key."""
    own = dict(options.settings)
    if options.gate is not None:
        own["gate"] = absolute_gate(options.gate)
    settings = read_settings(own, os.environ)  # refused here and now if it makes no sense
    if settings is not None:
        require_artifacts(settings.model_dump())
    rest, additional = take_option(list(options.arguments), OPTION)
    if KEY in additional:
        raise UsageError(f"{OPTION} holds '{KEY}' already", hint="--gate and --set say the same")
    for name in ("--host", "--port", "--api-key", "--served-model-name"):
        if any(word == name or word.startswith(name + "=") for word in rest):
            raise UsageError(f"{name} is an option of this command: it is not passed through")
    command = [options.interpreter, "-m", "vllm.entrypoints.cli.main", "serve", options.model]
    command += ["--host", options.host, "--port", str(port), OPTION, json.dumps({**additional, KEY: own})]
    if options.served_name:
        command += ["--served-model-name", options.served_name]
    return command + rest


def take_option(words: list[str], name: str) -> tuple[list[str], dict[str, Any]]:
    """The words without one option, and that option's JSON object."""
    rest, value = [], None
    pending = iter(words)
    for word in pending:
        if word == name:
            value = next(pending, None)
            if value is None:
                raise UsageError(f"{name} has no value")
        elif word.startswith(name + "="):
            value = word.partition("=")[2]
        else:
            rest.append(word)
    if value is None:
        return rest, {}
    try:
        found = json.loads(value)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"{name} is not a JSON object: {value}")
    return rest, found


def environment_of(options: ServeOptions, reports: Path, metrics: Path) -> dict[str, str]:
    environment = dict(os.environ)
    ours = {handshake.VARIABLE: str(reports), "PROMETHEUS_MULTIPROC_DIR": str(metrics)}
    environment |= ours
    copied = [name for name in environment.get("VLLM_RAY_EXTRA_ENV_VARS_TO_COPY", "").split(",") if name]
    environment["VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"] = ",".join([*copied, *ours])
    if options.api_key:
        environment["VLLM_API_KEY"] = options.api_key  # not on a command line that `ps` shows
    if options.control:
        environment["VLLM_SERVER_DEV_MODE"] = "1"
    return environment


def free_port(host: str, port: int) -> int:
    """The port itself, if nobody listens there; otherwise somebody else's health would be taken for ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(
                f"cannot listen on {host}:{port}: {error.strerror}", hint="--port 0 takes a free one"
            ) from None
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and Ctrl-C instead of dying of them."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # signals are somebody else's there
        yield seen
        return
    before = {
        number: signal.signal(number, lambda number, frame: seen.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def running(command: list[str], environment: dict[str, str], grace: float) -> Iterator[subprocess.Popen[bytes]]:
    """The server, in a session of its own, so that Ctrl-C reaches us alone; its output goes to stderr. Gone at the end."""
    server = subprocess.Popen(command, env=environment, stdout=2, start_new_session=True)
    try:
        yield server
    finally:
        if server.poll() is None:
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(grace)
        kill_session(server.pid)  # workers that outlived it, or all of them after the grace
        server.wait()


def kill_session(leader: int) -> None:
    """Its process group, and those of other groups in its session: workers of a Ray that vLLM has started lead their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
    killed: set[int] = set()
    while left := session_members(leader) - killed:  # again: one of them may have started another meanwhile
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed |= left


def session_members(leader: int) -> set[int]:
    """None where there is no /proc."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(int(path.name)) == leader:
                found.add(int(path.name))
    return found


def wait_until_healthy(server: subprocess.Popen[bytes], url: str, seconds: float, stopping: list[int]) -> bool:
    """False if told to stop meanwhile."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if stopping:
            return False
        if server.poll() is not None:
            raise InputError(
                f"vLLM did not start: exit code {server.returncode}",
                hint="its log above says why; sedac patch checks the plugin",
            )
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return True
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(POLL)
    raise InputError(f"vLLM is not healthy after {seconds:.0f} s", hint="a larger model needs longer to load")


def check_workers(reports: Path) -> list[dict[str, Any]]:
    """Every worker has the gate of these settings in its model, or an InputError."""
    deadline = time.monotonic() + LATE
    while True:
        found = handshake.read_reports(reports)
        engines = [entry for entry in found if entry["role"] == "engine"]
        try:
            if not engines:
                raise InputError(
                    "vLLM started without sedac: the plugin was not loaded",
                    hint="if VLLM_PLUGINS is set, it must name sedac; sedac patch shows what is wrong",
                )
            return handshake.require_workers(found, engines[0]["workers"], engines[0]["digest"])
        except InputError:
            if time.monotonic() > deadline:
                raise
        time.sleep(POLL)
