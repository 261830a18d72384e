"""`sedac doctor`: what this machine has and what it lacks."""

from __future__ import annotations

from sedac_cli.commands._common import sedac_command
from sedac_cli.console import Output


@sedac_command()
def doctor(out: Output) -> None:
    """Check Python, torch, CUDA, CuPy, bitsandbytes, vLLM, disk and the hub; never fails."""
    from sedac_cli.doctor import examine

    checks = examine()
    out.table(
        "this machine",
        ["check", "status", "found", "to change it"],
        [[c.name, c.status, c.detail, c.fix or ""] for c in checks],
    )
    out.result({"checks": checks})
