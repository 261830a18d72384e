"""The settings file that `sedac patch` leaves in a Python environment: with it, every vLLM started there runs a gate.

It lies in the environment itself (PREFIX/etc/sedac/vllm.json) or, where that is read-only, in the user's configuration folder
under a name made from the prefix. Variables go before it, additional_config before both; SEDAC_ENABLED=0 turns it off for a run.
It holds which vLLM it was proved with: a vLLM that was exchanged since then is refused until `sedac patch` has looked again.

    switch = read_switch(Path(sys.prefix))
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sedac_cli.artifacts.files import read_json
from sedac_cli.errors import InputError

SCHEMA = 1


@dataclass(frozen=True)
class Switch:
    path: Path
    sedac: str
    vllm: str
    settings: dict[str, Any]
    """By the names of `settings.Settings`."""
    proved: bool

    def document(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA, "sedac": self.sedac, "vllm": self.vllm, "settings": self.settings, "proved": self.proved,
        }  # fmt: skip

    def require(self, vllm: str) -> None:
        if vllm != self.vllm:
            raise InputError(
                f"{self.path} turns sedac on for vLLM {self.vllm}, and this is vLLM {vllm}",
                hint="sedac patch again proves it with this one; sedac patch --revert turns it off",
            )


def environment_place(prefix: Path) -> Path:
    return prefix / "etc" / "sedac" / "vllm.json"


def user_place(prefix: Path) -> Path:
    base = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    name = hashlib.sha256(str(prefix.resolve()).encode()).hexdigest()[:12]
    return base / "sedac" / f"vllm-{name}.json"


def places(prefix: Path) -> list[Path]:
    """Where a switch may lie; a user's own goes first."""
    return [user_place(prefix), environment_place(prefix)]


def read_switch(prefix: Path) -> Switch | None:
    for path in places(prefix):
        if path.is_file():
            return _read(path)
    return None


def _read(path: Path) -> Switch:
    found = read_json(path)
    try:
        if found["schema"] != SCHEMA:
            raise InputError(
                f"{path} has schema {found['schema']}, this sedac reads {SCHEMA}", hint="sedac patch again"
            )
        return Switch(path, str(found["sedac"]), str(found["vllm"]), dict(found["settings"]), bool(found["proved"]))
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"{path} is not a settings file of sedac patch", hint="sedac patch again, or delete it"
        ) from None
