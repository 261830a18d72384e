"""The settings file of an environment, in real virtual environments that hold our entry point and the shell of a vllm package."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from sedac_cli import __version__
from sedac_cli.errors import InputError, UsageError
from sedac_cli.vllm import patch_site as sites
from sedac_cli.vllm.settings import read_settings
from sedac_cli.vllm.switch import environment_place, read_switch, user_place


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """A Python of its own, in which sedac is installed and vllm 1.2.3 can be found."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    for name in list(os.environ):
        if name.startswith("SEDAC_") and name != "SEDAC_VLLM_TREES":
            monkeypatch.delenv(name)
    prefix = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(prefix)], check=True)
    packages = next(prefix.glob("lib/python*/site-packages"))
    (packages / "sedac.pth").write_text(f"{ROOT}\n")
    info = packages / f"sedac-{__version__}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sedac\nVersion: {__version__}\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nsedac = sedac_cli.vllm.plugin:register\n")
    (packages / "vllm").mkdir()
    (packages / "vllm" / "__init__.py").write_text("")
    set_vllm(prefix, "1.2.3")
    return prefix


def set_vllm(prefix: Path, version: str) -> None:
    package = next(prefix.glob("lib/python*/site-packages/vllm"))
    (package / "_version.py").write_text(f"__version__ = version = '{version}'\n")


def site_of(prefix: Path) -> sites.Site:
    return sites.find_site(str(prefix / "bin" / "python"))


def test_a_site_knows_what_it_has(environment):
    site = site_of(environment)
    assert (site.vllm, site.sedac, site.entry_point) == ("1.2.3", __version__, True)
    assert site.prefix == environment
    site.require_plugin()


def test_on_off_and_what_vllm_reads(environment, tmp_path):
    site = site_of(environment)
    values = sites.given_settings(["sinks=4", "SEDAC_LOG_EVERY=7"], "always:2")
    switch = sites.turn_on(site, values, proved=True)
    assert switch.path == environment_place(environment)
    found = read_switch(environment)
    settings = read_settings(None, {}, found.settings)
    assert (settings.gate, settings.sinks, settings.log_every) == ("always:2", 4, 7)
    assert read_settings(None, {"SEDAC_SINKS": "1"}, found.settings).sinks == 1
    assert read_settings({"sinks": 2}, {"SEDAC_SINKS": "1"}, found.settings).sinks == 2
    assert read_settings(None, {"SEDAC_ENABLED": "0"}, found.settings) is None
    assert sites.state_of(site)["state"] == "on"
    assert sites.turn_off(site) == [switch.path]
    assert not (environment / "etc").exists()
    assert sites.turn_off(site) == []
    assert read_switch(environment) is None


def test_a_place_that_cannot_be_written_falls_to_the_user_or_is_refused(environment, tmp_path):
    (environment / "etc").write_text("in the way of a folder")
    site = site_of(environment)
    switch = sites.turn_on(site, {"gate": "always:2"}, proved=False)
    assert switch.path == user_place(environment)
    assert read_switch(environment).path == switch.path
    sites.turn_off(site)
    (tmp_path / "home").mkdir(exist_ok=True)
    (tmp_path / "home" / "sedac").rmdir() if (tmp_path / "home" / "sedac").exists() else None
    (tmp_path / "home" / "sedac").write_text("in the way too")
    with pytest.raises(InputError, match="cannot write"):
        sites.turn_on(site, {}, proved=False)


def both_places(environment) -> tuple[Path, Path]:
    """Settings in both places, as when an environment became writable later."""
    own, shared = user_place(environment), environment_place(environment)
    sites.turn_on(site_of(environment), {"gate": "always:2"}, proved=False)
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_bytes(shared.read_bytes())
    return own, shared


def test_what_cannot_all_be_turned_off_is_left_alone(environment, sedac, monkeypatch):
    own, shared = both_places(environment)
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != shared.parent and may(path, mode))
    with pytest.raises(InputError, match=f"cannot delete {shared}: .*; nothing was deleted"):
        sites.turn_off(site_of(environment))
    assert sedac("patch", "--python", environment / "bin" / "python", "--revert").code == 3
    assert own.is_file()
    assert shared.is_file()
    monkeypatch.setattr(os, "access", may)
    assert sedac("patch", "--python", environment / "bin" / "python", "--revert").code == 0
    assert not own.exists()
    assert not shared.exists()


def test_a_revert_that_fails_half_way_says_what_is_gone(environment, monkeypatch):
    own, shared = both_places(environment)
    unlink = Path.unlink

    def guarded(path, *more, **words):
        if path == shared:
            raise PermissionError(1, "Operation not permitted")
        unlink(path, *more, **words)

    monkeypatch.setattr(Path, "unlink", guarded)
    with pytest.raises(InputError, match=f"cannot delete {shared}: Operation not permitted; deleted: {own}"):
        sites.turn_off(site_of(environment))
    assert shared.is_file()
    assert not own.exists()


def test_a_failure_gives_back_the_users_own_file_too(environment, monkeypatch):
    own, shared = both_places(environment)
    before = own.read_bytes()
    monkeypatch.setattr(Path, "write_bytes", lambda path, data: pytest.fail(f"{path} had not changed"))
    sites.delete(site_of(environment), shared)
    site = site_of(environment)

    def fails():
        with sites.kept_on_failure(site):
            assert sites.turn_on(site, {"gate": "always:1"}, proved=False).path == shared
            raise RuntimeError("the proof failed")

    with pytest.raises(RuntimeError, match="the proof failed"):
        fails()
    assert own.read_bytes() == before
    assert not shared.exists()


def test_an_exchanged_vllm_is_stale_and_refused(environment):
    sites.turn_on(site_of(environment), {"gate": "always:2"}, proved=True)
    set_vllm(environment, "1.3.0")
    report = sites.state_of(site_of(environment))
    assert report["state"] == "stale"
    assert "1.2.3" in report["why"]
    with pytest.raises(InputError, match=r"1\.2\.3.*1\.3\.0"):
        read_switch(environment).require("1.3.0")
    read_switch(environment).require("1.2.3")


def test_the_first_of_two_runs_keeps_the_second_out(environment, sedac):
    handle = os.open(environment, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        result = sedac("patch", "--python", environment / "bin" / "python", "--gate", "always:2", "--no-prove")
    finally:
        os.close(handle)
    assert result.code == 3
    assert "another sedac patch" in result.err
    assert read_switch(environment) is None


def test_a_proof_that_fails_leaves_things_as_they_were(environment, sedac):
    """The vllm here is a shell: it cannot run a model, and the command says so."""
    python = environment / "bin" / "python"
    result = sedac("patch", "--python", python, "--gate", "always:2")
    assert result.code == 3
    assert "did not run the tiny model" in result.err
    assert read_switch(environment) is None
    assert sedac("patch", "--python", python, "--gate", "always:1", "--no-prove").code == 0
    before = environment_place(environment).read_bytes()
    assert sedac("patch", "--python", python, "--gate", "always:2").code == 3
    assert environment_place(environment).read_bytes() == before


def test_the_command(environment, sedac, tmp_path):
    def ask(*more):
        return sedac("patch", "--python", environment / "bin" / "python", "--json", *more)

    dry = ask("--gate", "always:2", "--dry-run").json
    assert dry["would_set"] == {"gate": "always:2"}
    assert dry["state"] == "off"
    assert ask("--gate", "always:2", "--no-prove").json["proved"] is False
    assert ask("--status").json["state"] == "on"
    assert ask("--revert").json["state"] == "off"
    for arguments, code, words in (
        (["--gate", "learned:nowhere.pth@0.2"], 3, "no file"),
        (["--gate", "alway:2"], 2, "no gate 'alway'"),
        (["--set", "colour=red"], 2, "names:"),
        (["--set", "sinks=-1"], 2, "SEDAC_SINKS"),
        (["--set", f"probe_dir={tmp_path}"], 3, "sedac_probe_layer7.pth"),
        (["--target", str(tmp_path), "--gate", "always:2"], 2, "--target only"),
    ):
        result = ask(*arguments)
        assert result.code == code, arguments
        assert words in result.err


def test_what_is_missing_is_named(environment, sedac, tmp_path):
    packages = next(environment.glob("lib/python*/site-packages"))
    next(packages.glob("sedac-*.dist-info")).rename(packages / "gone")
    result = sedac("patch", "--python", environment / "bin" / "python", "--gate", "always:2")
    assert result.code == 3
    assert "pip install" in result.err
    (packages / "vllm" / "__init__.py").unlink()
    (packages / "vllm").rename(packages / "elsewhere")
    assert "has no vllm" in sedac("patch", "--python", environment / "bin" / "python").err
    assert sedac("patch", "--python", tmp_path / "nothing").code == 2
    assert sedac("patch", "--python", "/bin/true").code == 3


def test_a_settings_file_of_something_else_is_named(environment):
    path = environment_place(environment)
    path.parent.mkdir(parents=True)
    for text, words in (("{}", "not a settings file"), ("{", "not valid JSON"), ('{"schema": 9}', "schema 9")):
        path.write_text(text)
        with pytest.raises(InputError, match=words):
            read_switch(environment)
        assert sites.state_of(site_of(environment))["state"] == "broken"


def test_paths_in_a_gate_are_those_of_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sites.absolute_gate("learned:a/g.pth@0.25") == f"learned:{tmp_path}/a/g.pth@0.25"
    assert sites.absolute_gate("cascade:t.json") == f"cascade:{tmp_path}/t.json"
    assert sites.absolute_gate("stability:tau=0.99,k=3") == "stability:tau=0.99,k=3"
    with pytest.raises(UsageError):
        sites.given_settings(["enabled=0"], None)
