"""Whole or absent: atomic files, JSON, locks, folders."""

from __future__ import annotations

import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import python

from sedac_cli.artifacts import files
from sedac_cli.artifacts.files import atomic_file, folder_lock, make_folder, plain, read_json, write_json
from sedac_cli.errors import InputError


def test_a_crash_in_the_middle_leaves_the_old_content_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def crash():
        with atomic_file(path) as handle:
            handle.write(b"new")
            handle.flush()
            assert path.read_bytes() == b"old"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        crash()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_in_the_middle_leaves_nothing_visible(tmp_path):
    process = python(
        "-c",
        "import sys, time; from pathlib import Path; from sedac_cli.artifacts.files import atomic_file\n"
        "with atomic_file(Path(sys.argv[1])) as h:\n"
        "    h.write(b'half'); h.flush(); print('there', flush=True); time.sleep(60)",
        tmp_path / "file",
    )
    assert process.stdout.readline() == "there\n"
    process.kill()
    process.wait()
    left = [p.name for p in tmp_path.iterdir()]
    assert len(left) == 1
    assert left[0].startswith(".file.")
    files.remove_stale_parts(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_content_is_on_disk_before_the_rename(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(files.os, "fsync", lambda fd: calls.append("sync"))
    monkeypatch.setattr(files.os, "replace", lambda a, b: calls.append("rename"))
    monkeypatch.setattr(files.os, "unlink", lambda a: None)
    with atomic_file(tmp_path / "file") as handle:
        handle.write(b"x")
    assert calls == ["sync", "rename", "sync"]


def test_the_users_umask_holds(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "file") as handle:
            handle.write(b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_plain_values():
    @dataclass
    class Thing:
        where: Path
        sizes: tuple[float, ...]

    assert plain({1: Thing(Path("a"), (1.0, math.nan, math.inf))}) == {"1": {"where": "a", "sizes": [1.0, None, None]}}


def test_json_comes_back_and_damage_is_named(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": [1, 2.5, None, "é"], "b": math.nan})
    assert read_json(path) == {"a": [1, 2.5, None, "é"], "b": None}
    path.write_text('{"a": 1')
    with pytest.raises(InputError, match=r"x\.json is not valid JSON: .*line 1"):
        read_json(path)
    with pytest.raises(InputError, match="no such file"):
        read_json(tmp_path / "y.json")


def test_a_second_process_is_refused_and_told_who_holds_the_folder(tmp_path):
    code = (
        "import sys; from pathlib import Path; from sedac_cli.artifacts.files import folder_lock\n"
        "from sedac_cli.errors import InputError\n"
        "try:\n"
        "    with folder_lock(Path(sys.argv[1])): print('got it')\n"
        "except InputError as error: print(error)"
    )
    with folder_lock(tmp_path):
        out, _ = python("-c", code, tmp_path).communicate()
        assert f"another sedac run (process {os.getpid()}) is writing to {tmp_path}" in out
    out, _ = python("-c", code, tmp_path).communicate()
    assert out == "got it\n"


@pytest.mark.parametrize("where", ["/proc/sedac", "file/inside"])
def test_a_place_that_cannot_be_written_is_refused(tmp_path, where):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to"):
        make_folder(tmp_path / where)
