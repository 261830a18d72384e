"""A few marked lines in vLLM's plugin loader, for source trees in which entry points are not seen.

Always true: only a file that is known to the byte is patched; the original is kept beside it; a patched file is exactly the
original and the lines, or nothing is done and the difference is shown; a revert gives back the original byte for byte.
The lines load the plugin that the entry point would have loaded, so nothing of it exists twice.

    target = find_target(Path("vllm-source")); print(state_of(target).word); patch(target)
"""

from __future__ import annotations

import difflib
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sedac_cli import __version__
from sedac_cli.artifacts.files import atomic_file
from sedac_cli.errors import InputError
from sedac_cli.vllm.patch_known import DIGITS, KNOWN, fingerprint

LOADER = Path("plugins") / "__init__.py"
ANCHOR = "    plugins_loaded = True\n"
BEGIN, END = "    # >>> sedac", "    # <<< sedac"
SUFFIX = ".sedac-original"
MARK = re.compile(rf"^{re.escape(BEGIN)} (?P<version>\S+) .*?original sha256 (?P<digest>[0-9a-f]{{64}})", re.MULTILINE)


@dataclass(frozen=True)
class Target:
    file: Path
    version: str | None
    """Of the tree the file lies in, if it says so."""

    @property
    def backup(self) -> Path:
        return self.file.with_name(self.file.name + SUFFIX)


@dataclass(frozen=True)
class State:
    word: Literal["original", "patched", "changed", "unknown"]
    known_as: str | None = None
    """Versions of vLLM that have this very file."""
    by: str | None = None
    """The sedac that patched it."""
    difference: str = ""
    stale_backup: bool = False
    """A backup of another file lies beside: vLLM was exchanged after it had been patched."""


def find_target(path: Path) -> Target:
    """The loader named by a file, by the package's folder or by the folder above it."""
    if not path.exists():
        raise InputError(f"--target {path}: there is no such file or folder")
    path = path.resolve()
    candidates = [path] if path.is_file() else [path / LOADER, path / "vllm" / LOADER]
    found = next((c for c in candidates if c.is_file()), None)
    if found is None:
        raise InputError(f"--target {path}: neither {candidates[0]} nor {candidates[1]} is there")
    if found.parts[-2:] != LOADER.parts:
        raise InputError(
            f"--target {path}: the lines go into vLLM's plugin loader, vllm/{LOADER.as_posix()}",
            hint="name that file, or the folder of the vllm package",
        )
    return Target(found, tree_version(found.parent.parent))


def tree_version(package: Path) -> str | None:
    """What `_version.py` of a vllm package says, without importing it."""
    try:
        found = re.search(r"^__version__ = .*?['\"]([^'\"]+)['\"]", (package / "_version.py").read_text(), re.MULTILINE)
    except OSError:
        return None
    return found.group(1) if found else None


def patched_text(original: str) -> str:
    """The original with the lines in it."""
    if original.count(ANCHOR) != 1:
        raise InputError(f"the loader has {original.count(ANCHOR)} places to load the plugin at, expected 1")
    digest = hashlib.sha256(original.encode()).hexdigest()
    lines = (
        f"{BEGIN} {__version__} loads its plugin here; sedac patch --target THIS_FILE --revert takes it out; "
        f"original sha256 {digest}\n"
        "    from sedac_cli.vllm.plugin import register as register_sedac\n"
        "\n"
        "    register_sedac()\n"
        f"{END}\n"
    )
    return original.replace(ANCHOR, ANCHOR + lines)


def state_of(target: Target) -> State:
    text = _read(target.file)
    mark = MARK.search(text)
    if mark is None:
        digest, _ = fingerprint(text)
        known = next((name for name, (whole, _) in KNOWN.items() if whole == digest), None)
        stale = target.backup.is_file() and _read(target.backup) != text
        if known is None:
            return State("unknown", difference=difference_to_known(text, target.version), stale_backup=stale)
        return State("original", known, stale_backup=stale)
    by, digest = mark["version"], mark["digest"]
    original = without_lines(text)
    known = next((name for name, (whole, _) in KNOWN.items() if whole == digest), None)
    if hashlib.sha256(original.encode()).hexdigest() == digest and text.count(BEGIN) == 1:
        return State("patched", known, by)
    if target.backup.is_file() and hashlib.sha256(_read(target.backup).encode()).hexdigest() == digest:
        before = _read(target.backup)
        shown = difflib.unified_diff(
            before.splitlines(),
            original.splitlines(),
            "as vLLM has it",
            f"{target.file}, without sedac's lines",
            lineterm="",
            n=1,
        )
        return State("changed", known, by, "\n".join(shown))
    return State("changed", known, by, difference_to_known(original, target.version))


def without_lines(text: str) -> str:
    """The text less everything between the marks."""
    out, inside = [], False
    for line in text.splitlines(keepends=True):
        if line.startswith(BEGIN):
            inside = True
        if not inside:
            out.append(line)
        if line.startswith(END):
            inside = False
    return "".join(out)


def difference_to_known(text: str, version: str | None) -> str:
    """The lines that are not in the nearest known file, and the numbers of those of its lines that are missing."""
    mine = _cut(fingerprint(text)[1])
    lines = text.splitlines()

    def likeness(name: str) -> tuple[bool, float]:
        exact = version is not None and version.split("+")[0] in name.split(", ")
        return exact, difflib.SequenceMatcher(None, _cut(KNOWN[name][1]), mine, autojunk=False).ratio()

    nearest = max(KNOWN, key=likeness)
    shown = [f"against vLLM {nearest}:"]
    matcher = difflib.SequenceMatcher(None, _cut(KNOWN[nearest][1]), mine, autojunk=False)
    for what, a, b, c, d in matcher.get_opcodes():
        if what == "equal":
            continue
        if b > a:
            shown.append(f"- line {a + 1}" + (f" to {b}" if b > a + 1 else "") + " of vLLM's")
        shown += [f"+ {number + 1}: {lines[number]}" for number in range(c, d)]
    if len(shown) == 1:
        shown.append("only the white space at the ends of lines differs")
    return "\n".join(shown if len(shown) < 40 else [*shown[:40], f"... and {len(shown) - 40} lines more"])


def patch(target: Target) -> bool:
    """Write the lines; False if they were there already."""
    state = state_of(target)
    if state.word == "patched":
        if state.by != __version__:
            raise InputError(
                f"{target.file} was patched by sedac {state.by}, this is {__version__}",
                hint=f"sedac patch --target {target.file} --revert, then again",
            )
        return False
    if state.word != "original":
        raise InputError(
            _refusal(target, state), hint="the plugin needs no patch where vLLM loads plugins: sedac patch"
        )
    original = _read(target.file)
    text = patched_text(original)
    try:
        compile(text, str(target.file), "exec")
    except SyntaxError as error:
        raise InputError(f"{target.file} would not compile after the patch: {error}") from None
    _write(target.backup, original, like=target.file)
    _write(target.file, text, like=target.file)
    return True


def revert(target: Target) -> bool:
    """Give back the original; False if nothing of ours was there."""
    state = state_of(target)
    if state.word == "changed":
        raise InputError(
            _refusal(target, state), hint=f"undo that change, or copy {target.backup.name} over it if it is not wanted"
        )
    if state.word != "patched":
        found = target.backup.is_file()
        target.backup.unlink(missing_ok=True)
        return found
    _write(target.file, without_lines(_read(target.file)), like=target.file)
    target.backup.unlink(missing_ok=True)
    return True


def _refusal(target: Target, state: State) -> str:
    of = f" of vLLM {target.version}" if target.version else ""
    if state.word == "changed":
        return f"{target.file}{of} was changed after sedac {state.by} patched it:\n{state.difference}"
    return f"{target.file}{of} is not a file that sedac knows (vLLM {'; '.join(KNOWN)}):\n{state.difference}"


def _cut(joined: str) -> list[str]:
    return [joined[i : i + DIGITS] for i in range(0, len(joined), DIGITS)]


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None


def _write(path: Path, text: str, like: Path) -> None:
    try:
        mode = like.stat().st_mode
        with atomic_file(path) as handle:
            handle.write(text.encode())
        path.chmod(mode & 0o7777)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}", hint="run it as the owner, or use a tree of your own"
        ) from None
