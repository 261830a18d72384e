"""The source patch on the real files of several vLLM versions: SEDAC_VLLM_TREES names a folder with one unpacked wheel each."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import stat
from pathlib import Path

import pytest

from sedac_cli.errors import InputError
from sedac_cli.vllm import patch_source as source
from sedac_cli.vllm.patch_known import KNOWN, fingerprint


def trees() -> list[Path]:
    """Folders of real vllm packages."""
    if given := os.environ.get("SEDAC_VLLM_TREES"):
        return sorted(path.parent for path in Path(given).glob("**/vllm/_version.py"))
    spec = importlib.util.find_spec("vllm")
    return [Path(spec.submodule_search_locations[0])] if spec and spec.submodule_search_locations else []


REAL = trees()
WHY = "no real vLLM to patch: SEDAC_VLLM_TREES names a folder of unpacked wheels"


@pytest.fixture(params=REAL or [None], ids=lambda tree: str(tree and source.tree_version(tree)))
def tree(request, tmp_path) -> Path:
    """A copy of what the patch reads of one version."""
    if request.param is None:
        pytest.skip(WHY)
    package = tmp_path / "vllm"
    (package / "plugins").mkdir(parents=True)
    for name in ("_version.py", "plugins/__init__.py"):
        (package / name).write_bytes((request.param / name).read_bytes())
    return package


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_there_and_back_is_the_same_file(tree):
    target = source.find_target(tree.parent)
    before = digest(target.file)
    target.file.chmod(0o640)
    assert source.state_of(target).word == "original"
    assert source.patch(target)
    assert source.state_of(target).word == "patched"
    assert digest(target.backup) == before != digest(target.file)
    assert stat.S_IMODE(target.file.stat().st_mode) == 0o640
    patched = digest(target.file)
    assert not source.patch(target)
    assert digest(target.file) == patched
    assert source.revert(target)
    assert digest(target.file) == before
    assert [path.name for path in target.file.parent.iterdir()] == ["__init__.py"]
    assert not source.revert(target)


def test_the_patched_loader_loads_the_plugin_without_entry_points(tree, monkeypatch):
    """The patched function is run as it stands, with vLLM's environment and our plugin's `register` put beside it."""
    import sys
    import types

    target = source.find_target(tree)
    source.patch(target)
    envs = types.ModuleType("vllm.envs")
    envs.VLLM_PLUGINS = [""]
    package = types.ModuleType("vllm")
    package.envs = envs
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm.envs", envs)
    from sedac_cli.vllm import plugin

    called = []
    monkeypatch.setattr(plugin, "register", lambda: called.append(1))
    space: dict = {"__name__": "vllm.plugins"}
    exec(compile(target.file.read_text(), "loader", "exec"), space)
    space["load_general_plugins"]()
    space["load_general_plugins"]()
    assert called == [1]


def test_a_file_somebody_else_changed_is_refused_with_the_difference(tree):
    target = source.find_target(tree)
    text = target.file.read_text()
    target.file.write_text(text.replace("plugins_loaded = False", "plugins_loaded = False  # mine", 1))
    before = digest(target.file)
    with pytest.raises(InputError) as error:
        source.patch(target)
    number = text.splitlines().index("plugins_loaded = False") + 1
    assert f"+ {number}: plugins_loaded = False  # mine" in error.value.message
    assert f"- line {number} of vLLM's" in error.value.message
    assert digest(target.file) == before
    assert not target.backup.exists()


@pytest.mark.parametrize("backup", [True, False], ids=["backup", "no backup"])
def test_a_patched_file_that_was_changed_is_not_reverted(tree, backup):
    target = source.find_target(tree)
    source.patch(target)
    if not backup:
        target.backup.unlink()
    target.file.write_text(target.file.read_text() + "import evil\n")
    for action in (source.revert, source.patch):
        with pytest.raises(InputError, match=r"\+.*import evil"):
            action(target)
    target.file.write_text(target.file.read_text().removesuffix("import evil\n"))
    assert source.revert(target)
    assert source.state_of(target).word == "original"


def test_an_upgrade_over_a_patch_is_seen(tree):
    target = source.find_target(tree)
    text = target.file.read_text()
    source.patch(target)
    target.backup.write_text(text + "# of an older version\n")
    target.file.write_text(text)
    assert source.state_of(target).stale_backup
    assert source.patch(target)
    assert target.backup.read_text() == text


def test_an_older_sedac_is_named(tree, monkeypatch):
    target = source.find_target(tree)
    monkeypatch.setattr(source, "__version__", "0.0.1")
    source.patch(target)
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"sedac 0\.0\.1"):
        source.patch(target)
    assert source.revert(target)


def test_what_is_no_loader_is_refused(tmp_path):
    other = tmp_path / "qwen2.py"
    other.write_text("x = 1\n")
    for path, words in ((other, "plugin loader"), (tmp_path, "neither"), (tmp_path / "gone", "no such")):
        with pytest.raises(InputError, match=words):
            source.find_target(path)


@pytest.mark.skipif(not REAL, reason=WHY)
def test_known_files_are_the_real_ones():
    for tree in REAL:
        version = source.tree_version(tree)
        entry = next((entry for names, entry in KNOWN.items() if version in names.split(", ")), None)
        if entry is not None:
            assert fingerprint((tree / "plugins" / "__init__.py").read_text()) == entry


def test_the_command_says_what_it_would_do_and_does_it(tree, sedac):
    def ask(*more):
        return sedac("patch", "--target", tree, "--json", *more).json

    assert ask("--dry-run")["state"] == "original"
    assert ask("--no-prove")["state"] == "patched"
    assert ask("--status")["by"]
    assert ask("--revert")["state"] == "original"
    (tree / "plugins" / "__init__.py").write_text("nothing\n")
    refused = sedac("patch", "--target", tree)
    assert refused.code == 3
    assert "+ 1: nothing" in refused.err
    assert sedac("patch", "--status", "--revert").code == 2
