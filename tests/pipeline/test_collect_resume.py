"""Killed, interrupted, out of disk, run twice, spread over processes: the files end the same, or are not there at all."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import python, run_python

from sedac_cli.artifacts.files import folder_lock
from sedac_cli.pipeline.spool import Spool, all_batches, read_rows

# A run that commits every batch and takes its time, announcing each batch on stderr.
SLOW = """
import sys, time
import sedac_cli.pipeline.spool as spool, sedac_cli.pipeline.collect as c
spool.COMMIT_SECONDS = 0
real = c._Collection.run_batch
def run_batch(*args):
    print("batch", file=sys.stderr, flush=True)
    time.sleep(0.05)
    return real(*args)
c._Collection.run_batch = run_batch
from sedac_cli.__main__ import main
main(sys.argv[1:])
"""


@pytest.fixture
def args(tiny_folder, text_file):
    return ["collect", "--model", tiny_folder, "--dataset", text_file, "--layers", "1,3", "--max-length", "32",
            "--samples", "60", "--batch-size", "4", "--quiet"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_folder, text_file) -> Path:
    """The same collection, never interrupted."""
    from sedac_cli.config import ModelSpec, TextSpec
    from sedac_cli.pipeline.collect import CollectOptions, collect

    folder = tmp_path_factory.mktemp("whole")
    text = TextSpec(str(text_file), samples=60, max_length=32)
    collect(CollectOptions((1, 3), folder, batch_size=4), ModelSpec(str(tiny_folder)), text)
    return folder


def visible(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


def assert_same_files(folder: Path, whole: Path) -> None:
    assert visible(folder) == visible(whole)
    assert len(visible(folder)) == 7
    for name in visible(whole):
        if name == "manifest.json":
            one, two = (json.loads((f / name).read_text()) for f in (folder, whole))
            assert one["steps"]["collect"]["files"] == two["steps"]["collect"]["files"]
        else:
            assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    assert not (folder / ".partial").exists()


def killed_after(batches: int, args, folder: Path) -> None:
    process = python("-c", SLOW, *args, "--save-dir", folder)
    for _ in range(batches):
        assert process.stderr.readline() == "batch\n"
    process.kill()
    process.communicate()
    assert visible(folder) == []


def test_killed_and_resumed_is_the_same_as_never_killed(tmp_path, args, whole, sedac):
    folder = tmp_path / "d"
    killed_after(5, args, folder)
    assert [b.index for b in all_batches(folder / ".partial")] == [0, 1, 2, 3]

    refused = sedac(*args, "--save-dir", folder)
    assert refused.code == 3
    assert "unfinished" in refused.err
    assert "--resume" in refused.err

    other = sedac(*args, "--save-dir", folder, "--resume", "--max-length", 16, "--target", "lens")
    assert other.code == 3
    assert "target: was final, now lens" in other.err.replace("settings.", "")
    assert "text.max_length: was 32, now 16" in other.err

    # What a crash can leave: half a journal line, rows that were never committed, a half-written file.
    with (folder / ".partial/rank0.journal").open("a") as journal:
        journal.write('{"batch": 4, "ro')
    with (folder / ".partial/rank0.hidden1.raw").open("ab") as rows:
        rows.write(b"x" * 1001)
    (folder / ".hidden_states_layer1.pt.abc.part").write_text("half")

    assert sedac(*args, "--save-dir", folder, "--resume").code == 0
    assert_same_files(folder, whole)
    assert not list(folder.glob(".*.part"))

    done = sedac(*args, "--save-dir", folder, "--resume")
    assert done.code == 3
    assert "complete" in done.err
    again = sedac(*args, "--save-dir", folder)
    assert again.code == 3
    assert "finished" in again.err
    assert "--overwrite" in again.err
    assert_same_files(folder, whole)


def test_resume_where_nothing_is_begins(tmp_path, args, whole, sedac):
    assert sedac(*args, "--save-dir", tmp_path / "d", "--resume").code == 0
    assert_same_files(tmp_path / "d", whole)


def test_resume_and_overwrite_contradict(tmp_path, args, sedac):
    assert sedac(*args, "--save-dir", tmp_path, "--resume", "--overwrite").code == 2


def test_a_text_that_changed_is_not_resumed_with(tmp_path, args, text_file, sedac, monkeypatch):
    from sedac_cli.pipeline.collect import _Collection

    mine = tmp_path / "text.txt"
    shutil.copy(text_file, mine)
    args[args.index(text_file)] = mine
    real = _Collection.run_batch

    def interrupted(self, samples, first):
        if first == 12:
            raise KeyboardInterrupt
        return real(self, samples, first)

    with monkeypatch.context() as patch:
        patch.setattr(_Collection, "run_batch", interrupted)
        assert sedac(*args, "--save-dir", tmp_path / "d").code == 130
    assert len(all_batches(tmp_path / "d/.partial")) == 3
    mine.write_text(mine.read_text().replace("sea", "sky"))
    result = sedac(*args, "--save-dir", tmp_path / "d", "--resume")
    assert result.code == 3
    assert "has changed since the run was begun" in result.err


@pytest.mark.parametrize("damage", [None, "{", '{"schema_version": 9}'])
def test_overwrite_replaces_even_what_cannot_be_read(tmp_path, args, whole, sedac, damage):
    folder = Path(shutil.copytree(whole, tmp_path / "d"))
    (folder / "hidden_states_layer0.pt").write_text("of another run")
    (folder / "notes.txt").write_text("mine")
    if damage is not None:
        (folder / "manifest.json").write_text(damage)
    assert sedac(*args, "--save-dir", folder, "--overwrite").code == 0
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "notes.txt").unlink()
    assert_same_files(folder, whole)


def test_two_runs_at_once(tmp_path, args, sedac):
    with folder_lock(tmp_path):
        result = sedac(*args, "--save-dir", tmp_path)
    assert result.code == 3
    assert f"another sedac run (process {os.getpid()})" in result.err


@pytest.mark.parametrize("where", ["/proc/sedac", "{file}", "{file}/inside"])
def test_a_place_that_cannot_be_written(tmp_path, args, sedac, where):
    (tmp_path / "file").write_text("")
    result = sedac(*args, "--save-dir", where.format(file=tmp_path / "file"))
    assert result.code == 3
    assert "cannot write to" in result.err
    assert "Traceback" not in result.err


# A full disk -------------------------------------------------------------------------------------------------


@pytest.fixture
def limited():
    """Files of this process may not grow beyond a size: the kernel then says so as it does of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, before if size is None else (size, before[1]))

    yield limit
    limit(None)


@pytest.mark.parametrize("when", ["while collecting", "while merging"])
def test_no_room_is_explained_and_resumed_from(tmp_path, args, whole, sedac, limited, when):
    rows = 60 * 32 * 32 * 4  # bytes of one raw file of states; the finished file is a little larger
    limited(rows - 5000 if when == "while collecting" else rows + 100)
    result = sedac(*args, "--save-dir", tmp_path / "d")
    limited(None)
    assert result.code == 3, result.err
    assert f"cannot write to {tmp_path / 'd'}: File too large" in result.err
    assert "--resume" in result.err
    assert "Traceback" not in result.err
    assert visible(tmp_path / "d") == []
    assert sedac(*args, "--save-dir", tmp_path / "d", "--resume").code == 0
    assert_same_files(tmp_path / "d", whole)


def test_a_full_file_system(tmp_path, args, whole, sedac):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    made = mount and subprocess.run([mount, "-t", "tmpfs", "-o", "size=300k", "none", disk], capture_output=True)
    if not made or made.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        result = sedac(*args, "--save-dir", disk / "d")
        assert result.code == 3
        assert f"cannot write to {disk / 'd'}: No space left on device" in result.err
        assert visible(disk / "d") == []
        subprocess.run(["mount", "-o", "remount,size=9m", disk], check=True)
        assert sedac(*args, "--save-dir", disk / "d", "--resume").code == 0
        assert_same_files(disk / "d", whole)
    finally:
        subprocess.run(["umount", disk], check=True)


# Several processes -------------------------------------------------------------------------------------------

KEEP = """
import json, shutil, sys
import sedac_cli.pipeline.collect as c
remove = shutil.rmtree
def keep(path, **more):
    if (path / "run.json").exists():
        shutil.copytree(path, str(path) + ".kept", dirs_exist_ok=True)
    remove(path, **more)
c.shutil.rmtree = keep
from sedac_cli.__main__ import main
main(sys.argv[1:])
"""


def test_two_processes_write_the_files_of_one(tmp_path, args, whole):
    (tmp_path / "run.py").write_text(KEEP)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = run_python(*launch, tmp_path / "run.py", *args, "--save-dir", tmp_path / "d", "--json")
    assert result.code == 0, result.err
    assert result.json["tokens"] == 60 * 32  # one document, of the first process
    shares = {rank: [b.index for b in all_batches(tmp_path / "d/.partial.kept") if b.rank == rank] for rank in (0, 1)}
    assert shares == {0: list(range(0, 15, 2)), 1: list(range(1, 15, 2))}
    shutil.rmtree(tmp_path / "d/.partial.kept")
    assert_same_files(tmp_path / "d", whole)


def test_processes_of_any_launcher_find_each_other(monkeypatch):
    """torchrun on a machine without a GPU: accelerate must be told to join, or each process thinks it is alone."""
    accelerate = pytest.importorskip("accelerate")
    from sedac_cli.pipeline.world import World

    told = []

    class State:
        process_index, num_processes = 1, 2

        def __init__(self, cpu):
            told.append(cpu)

    monkeypatch.setattr(accelerate, "PartialState", State)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    world = World.join()
    assert (told, world.rank, world.size, world.main) == ([True], 1, 2, False)
    monkeypatch.delenv("WORLD_SIZE")
    assert (World.join().main, World.join().size) == (True, 1)


# The spool ---------------------------------------------------------------------------------------------------


def test_only_committed_rows_count(tmp_path):
    spool = Spool(tmp_path, 0, {"a": 2})
    spool.add(0, 2, {"a": b"0011"}, {})
    spool.commit()
    spool.add(2, 1, {"a": b"22"}, {})
    spool.close()  # never committed
    again = Spool(tmp_path, 0, {"a": 2})
    again.add(1, 1, {"a": b"11"}, {"note": 1})
    again.commit()
    other = Spool(tmp_path, 1, {"a": 2})
    other.add(2, 1, {"a": b"zz"}, {})
    other.commit()
    batches = all_batches(tmp_path)
    assert [(b.index, b.rank, b.rows) for b in batches] == [(0, 0, 2), (1, 0, 1), (2, 1, 1)]
    assert b"".join(read_rows(tmp_path, batches, "a", 2)) == b"001111zz"


def test_an_interrupted_commit_is_not_written_twice(tmp_path, monkeypatch):
    spool = Spool(tmp_path, 0, {"a": 1})
    spool.add(0, 1, {"a": b"0"}, {})
    real, calls = os.fsync, []

    def fsync(fd):
        calls.append(fd)
        if len(calls) == 2:  # the journal's: its line is written
            raise KeyboardInterrupt
        real(fd)

    monkeypatch.setattr("sedac_cli.pipeline.spool.os.fsync", fsync)
    with pytest.raises(KeyboardInterrupt):
        spool.commit()
    spool.commit()  # what `collect` does on its way out
    spool.close()
    assert [b.index for b in all_batches(tmp_path)] == [0]
