"""The vLLM of a Python environment, and the settings file that turns the plugin on in it.

Always true: one run at a time per environment; the file is written whole or not at all; an environment that cannot be written
is left alone and the user's own folder is used instead, which is said; what was there before comes back if the proof fails.

    site = find_site("/opt/vllm/bin/python"); turn_on(site, {"gate": "always:20"}); turn_off(site)
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sedac_cli import __version__
from sedac_cli.artifacts.files import make_folder, write_json
from sedac_cli.errors import InputError, SedacError, UsageError, did_you_mean
from sedac_cli.vllm.patch_source import tree_version
from sedac_cli.vllm.settings import NAMES, Settings, read_settings
from sedac_cli.vllm.switch import Switch, environment_place, places, read_switch, user_place

GROUP = "vllm.general_plugins"
ASK = f"""
import importlib.metadata as m, importlib.util as u, json, sys
spec = u.find_spec("vllm")
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
print(json.dumps({{
    "python": ".".join(map(str, sys.version_info[:3])), "prefix": sys.prefix, "vllm": version("vllm"),
    "package": list(spec.submodule_search_locations)[0] if spec and spec.submodule_search_locations else None,
    "sedac": version("sedac"), "importable": u.find_spec("sedac_cli") is not None,
    "entry_point": any(e.value == "sedac_cli.vllm.plugin:register" for e in m.entry_points(group="{GROUP}")),
}}))
"""


@dataclass(frozen=True)
class Site:
    """One interpreter, and what of ours and of vLLM's it can import."""

    interpreter: str
    python: str
    prefix: Path
    vllm: str
    package: Path
    """The folder `vllm` is imported from."""
    sedac: str | None
    entry_point: bool

    def require_plugin(self) -> None:
        if self.sedac is None or not self.entry_point:
            raise InputError(
                f"sedac is not installed beside vLLM {self.vllm} in {self.prefix}",
                hint=f"{self.interpreter} -m pip install --no-deps sedac=={__version__}",
            )
        if self.sedac != __version__:
            raise InputError(
                f"{self.prefix} has sedac {self.sedac}, this is sedac {__version__}",
                hint=f"{self.interpreter} -m pip install --no-deps sedac=={__version__}, or run its own: "
                f"{self.interpreter} -m sedac_cli patch",
            )


def find_site(interpreter: str) -> Site:
    """Ask an interpreter what it has. vLLM is not imported: that takes long and can fail for reasons of its own."""
    path = shutil.which(interpreter)
    if path is None:
        raise UsageError(f"--python {interpreter}: there is no such program", hint="name the python that runs vLLM")
    asked = [os.path.abspath(path), "-c", ASK]
    done = subprocess.run(
        asked, cwd="/", capture_output=True, text=True, timeout=120
    )  # nothing of the folder we stand in
    try:
        found = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        raise InputError(f"{interpreter} is not a Python that can be asked: {last}") from None
    if found["package"] is None:
        raise InputError(
            f"{interpreter} (Python {found['python']}) has no vllm",
            hint="--python names the interpreter that runs vLLM; pip install 'sedac[vllm]' installs both",
        )
    package = Path(found["package"])
    sedac = found["sedac"] or ("of a folder on its path" if found["importable"] else None)
    return Site(
        interpreter=os.path.abspath(path), python=found["python"], prefix=Path(found["prefix"]),
        vllm=tree_version(package) or found["vllm"] or "of no known version", package=package, sedac=sedac,
        entry_point=found["entry_point"],
    )  # fmt: skip


def given_settings(pairs: list[str], gate: str | None) -> dict[str, Any]:
    """`NAME=VALUE` in the words of the SEDAC_ variables, checked; paths become absolute: the server runs elsewhere."""
    environment = {"SEDAC_ENABLED": "1"}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        name = name.strip().lower().removeprefix("sedac_")
        if not equals or name not in NAMES or name == "enabled":
            known = ", ".join(n for n in NAMES if n != "enabled")
            raise UsageError(f"--set {pair}: expected NAME=VALUE", hint=f"names: {known}")
        environment["SEDAC_" + name.upper()] = value
    if gate is not None:
        environment["SEDAC_GATE"] = absolute_gate(gate)
    settings = read_settings(None, environment)
    assert settings is not None
    keep = {*settings.given, *(["probe_dir"] if settings.gate is None else [])}
    return {name: value for name, value in settings.model_dump().items() if name in keep}


def absolute_gate(spec: str) -> str:
    """`learned:gates.pth@0.25` with the path it means from here."""
    name, colon, argument = spec.partition(":")
    path, at, rest = argument.rpartition("@") if "@" in argument else (argument, "", "")
    if Path(path).suffix not in (".pth", ".json"):
        return spec
    return f"{name}{colon}{Path(path).expanduser().absolute()}{at}{rest}"


def require_artifacts(settings: Mapping[str, Any]) -> None:
    """There is such a gate, and the files it is made from are there and are what they say they are; whether they fit a model,
    vLLM says."""
    from sedac_cli.gates.registry import GATES
    from sedac_cli.probes import load_probe, probe_name
    from sedac_cli.vllm.forced import ForcedGate
    from sedac_cli.vllm.plan import artifact_files

    asked = Settings.model_validate({"enabled": True, **settings})
    known = [*GATES, ForcedGate.name]
    if asked.gate is not None and (name := asked.gate.partition(":")[0].strip()) not in known:
        raise UsageError(f"there is no gate '{name}'.{did_you_mean(name, known)}", hint="gates: " + ", ".join(known))
    files = artifact_files(asked)
    if asked.gate is None and len(files) != len(asked.probe_layers):
        there = {path.name for path in files}
        missing = [probe_name(layer) for layer in asked.probe_layers if probe_name(layer) not in there]
        raise InputError(
            f"{asked.probe_dir} has no {', '.join(missing)}",
            hint="--gate SPEC, or --set probe_dir=... probe_layers=...",
        )
    for path in files:
        if path.name.startswith("sedac_probe_layer"):
            load_probe(path)


def turn_on(site: Site, settings: dict[str, Any], proved: bool) -> Switch:
    """Write the file; in the environment, or where that is read-only, for this user."""
    path = environment_place(site.prefix) if can_write(environment_place(site.prefix)) else user_place(site.prefix)
    make_folder(path.parent)
    switch = Switch(path, __version__, site.vllm, settings, proved)
    write_json(path, switch.document())
    return switch


def turn_off(site: Site) -> list[Path]:
    """Delete the file wherever it lies, or nothing at all; what was deleted."""
    found = [path for path in places(site.prefix) if path.is_file()]
    if fixed := [path for path in found if not os.access(path.parent, os.W_OK | os.X_OK)]:
        raise InputError(
            f"cannot delete {' or '.join(map(str, fixed))}: no right to change {fixed[0].parent}; nothing was deleted",
            hint="run it as the owner of that file; SEDAC_ENABLED=0 turns sedac off for a run",
        )
    gone: list[Path] = []
    for path in found:
        try:
            delete(site, path)
        except OSError as error:  # rights that cannot be asked for: immutable files, folders of many owners
            done = f"deleted: {', '.join(map(str, gone))}" if gone else "nothing was deleted"
            raise InputError(
                f"cannot delete {path}: {error.strerror}; {done}", hint="run it as the owner of that file"
            ) from None
        gone.append(path)
    return gone


def delete(site: Site, path: Path) -> None:
    """A settings file, and the folders that nothing else is in."""
    path.unlink()
    ours = [path.parent] if path == user_place(site.prefix) else [path.parent, path.parent.parent]  # PREFIX/etc too
    for folder in ours:
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def kept_on_failure(site: Site) -> Iterator[None]:
    """Put every settings file back as it was if what happens inside fails."""
    before = {path: path.read_bytes() if path.is_file() else None for path in places(site.prefix)}
    try:
        yield
    except BaseException:
        for path, content in before.items():
            now = path.read_bytes() if path.is_file() else None
            if content is not None and content != now:  # what was not touched may be another's, and read-only
                path.write_bytes(content)
            elif content is None and now is not None:
                delete(site, path)
        raise


def can_write(path: Path) -> bool:
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    return os.access(folder, os.W_OK | os.X_OK) and (not path.exists() or os.access(path, os.W_OK))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One run per place. The lock is on the folder itself: nothing is left behind, and a read-only one can be locked."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another sedac patch is at work on {folder}", hint="wait for it") from None
        yield
    finally:
        os.close(handle)


def state_of(site: Site) -> dict[str, Any]:
    """What `sedac patch --status` says of an environment."""
    report: dict[str, Any] = {
        "interpreter": site.interpreter, "python": site.python, "vllm": site.vllm, "package": str(site.package),
        "sedac": site.sedac, "entry_point": site.entry_point, "state": "off", "file": None, "settings": None, "proved": None,
    }  # fmt: skip
    try:
        switch = read_switch(site.prefix)
    except SedacError as error:
        return report | {"state": "broken", "why": error.message}
    if switch is None:
        return report
    report |= {
        "state": "on", "file": str(switch.path), "settings": switch.settings, "proved": switch.proved,
        "written_for": switch.vllm, "written_by": switch.sedac,
    }  # fmt: skip
    if switch.vllm != site.vllm:
        report |= {
            "state": "stale",
            "why": f"written for vLLM {switch.vllm}, here is {site.vllm}: servers refuse to start",
        }
    elif not site.entry_point:
        report |= {"state": "broken", "why": "sedac is no longer installed there: vLLM runs without it"}
    return report
