"""Proof of life from every process: a plugin that fails to load is only logged by vLLM, which then serves without it.

When SEDAC_HANDSHAKE_DIR is set, each process of an engine that runs a gate leaves a file there: the one that configured the
engine, and every worker once its model is gated. Whoever started the engine counts them.

    reports = read_reports(folder)
    require_workers(reports, count=2, digest=settings.digest)
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from sedac_cli.artifacts.files import read_json, write_json
from sedac_cli.errors import InputError

VARIABLE = "SEDAC_HANDSHAKE_DIR"


def report(role: str, facts: dict[str, Any]) -> None:
    folder = os.environ.get(VARIABLE)
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        name = f"{role}-{os.uname().nodename}-{os.getpid()}-{facts.get('rank', 0)}.json"
        write_json(Path(folder) / name, {"role": role, "time": time.time(), **facts})


def read_reports(folder: Path) -> list[dict[str, Any]]:
    return [read_json(path) for path in sorted(folder.glob("*.json"))]


def require_workers(reports: list[dict[str, Any]], count: int, digest: str | None = None) -> list[dict[str, Any]]:
    """The workers' reports, once there are as many as workers and all run the same settings."""
    workers = [entry for entry in reports if entry["role"] == "worker"]
    if len(workers) != count:
        raise InputError(
            f"{len(workers)} of {count} workers say that the gate is in force: vLLM runs without it elsewhere",
            hint="is sedac installed where vLLM runs, and does VLLM_PLUGINS, if set, name it?",
        )
    found = sorted({entry["digest"] for entry in workers})
    if found != [digest or found[0]]:
        raise InputError(f"workers run settings {', '.join(found)}, expected {digest or 'one and the same'}")
    return workers
