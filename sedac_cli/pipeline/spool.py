"""Rows on their way to a tensor file: appended to raw files, committed batch by batch in a journal, merged at the end.

Always true: a row counts only if the journal line of its batch is on disk, and that line is written after the rows are.
So a run that is killed loses at most the batches since the last commit, and a resumed run gives the same bytes.
Every process of a distributed run has files of its own; the merge puts batches back in their order.

    spool = Spool(folder, rank=0); spool.add(batch=3, rows={"ids": bytes_}, info={...}); spool.commit()
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

COMMIT_SECONDS = 5.0


@dataclass(frozen=True)
class Batch:
    """One committed batch and where its rows lie: `rank` names the files, `start` counts rows before it."""

    index: int
    rank: int
    start: int
    rows: int
    info: dict[str, Any]


class Spool:
    """The files of one process. `row_bytes` is the size of one row in each raw file."""

    def __init__(self, folder: Path, rank: int, row_bytes: dict[str, int]):
        self.folder = folder
        self.rank = rank
        self.row_bytes = row_bytes
        committed = sum(b.rows for b in read_journal(folder, rank))
        self._files: dict[str, BinaryIO] = {}
        for name, size in row_bytes.items():
            handle = raw_path(folder, rank, name).open("ab")
            handle.truncate(committed * size)
            self._files[name] = handle
        self._trim_journal()
        self._journal = _journal_path(folder, rank).open("ab")
        self._pending: list[bytes] = []
        self._last_commit = time.monotonic()

    def _trim_journal(self) -> None:
        """Drop a last line that a crash cut short: appending to it would spoil the next one."""
        path = _journal_path(self.folder, self.rank)
        if path.exists():
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:
                os.truncate(path, len(whole))

    def add(self, index: int, rows: int, data: Mapping[str, bytes | memoryview], info: dict[str, Any]) -> None:
        for name, payload in data.items():
            self._files[name].write(payload)
        line = json.dumps({"batch": index, "rows": rows, "info": info}) + "\n"
        self._pending.append(line.encode())
        if time.monotonic() - self._last_commit > COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        for handle in self._files.values():
            handle.flush()
            os.fsync(handle.fileno())
        # Taken before they are written: a Ctrl-C in between must not write them twice.
        lines, self._pending = self._pending, []
        self._journal.write(b"".join(lines))
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self._last_commit = time.monotonic()

    def close(self) -> None:
        for handle in (*self._files.values(), self._journal):
            with contextlib.suppress(OSError):  # a full disk has been reported by the write that met it
                handle.close()


def _journal_path(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.journal"


def raw_path(folder: Path, rank: int, name: str) -> Path:
    return folder / f"rank{rank}.{name}.raw"


def read_journal(folder: Path, rank: int) -> list[Batch]:
    """The committed batches of one process, in the order of their rows."""
    path = _journal_path(folder, rank)
    batches: list[Batch] = []
    start = 0
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else []:
        entry = json.loads(line)
        batches.append(Batch(entry["batch"], rank, start, entry["rows"], entry["info"]))
        start += entry["rows"]
    return batches


def all_batches(folder: Path) -> list[Batch]:
    """What every process has committed, in batch order."""
    ranks = sorted(int(p.stem.removeprefix("rank")) for p in folder.glob("rank*.journal"))
    return sorted((b for rank in ranks for b in read_journal(folder, rank)), key=lambda b: b.index)


def read_rows(folder: Path, batches: list[Batch], name: str, row_bytes: int) -> Iterator[bytes]:
    """The raw bytes of one column, batch by batch in order."""
    handles: dict[int, BinaryIO] = {}
    try:
        for batch in batches:
            if batch.rank not in handles:
                handles[batch.rank] = raw_path(folder, batch.rank, name).open("rb")
            handle = handles[batch.rank]
            handle.seek(batch.start * row_bytes)
            yield handle.read(batch.rows * row_bytes)
    finally:
        for handle in handles.values():
            handle.close()
