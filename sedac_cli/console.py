"""What a person and a script see: stdout is data (tables or one JSON document), stderr is everything else.

Only `commands/` and `__main__` use this module; the library returns results and takes a progress factory.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import sys
import traceback
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sedac_cli.errors import SedacError

_resume_hint: str | None = None


class Output:
    """How one command talks. `json` keeps stdout to a single document; `quiet` silences progress and notes."""

    def __init__(self, json: bool = False, quiet: bool = False):
        self.json = json
        self.quiet = quiet
        setup_logging(quiet)

    def note(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr)

    def progress(self) -> Any:
        """A tqdm factory: rate and remaining time on stderr, silent under --quiet."""
        from tqdm import tqdm

        return partial(tqdm, file=sys.stderr, disable=self.quiet, dynamic_ncols=True, leave=True, mininterval=0.2)

    def result(self, data: Any) -> None:
        """Print the JSON document, if that is what was asked for."""
        if self.json:
            print(json.dumps(plain(data), indent=2, ensure_ascii=False, allow_nan=False))

    def table(
        self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], caption: str | None = None
    ) -> None:
        """A table on stdout; nothing under --json, where the same figures are in the document."""
        if self.json:
            return
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
        for number, column in enumerate(columns):
            table.add_column(column, justify="left" if number == 0 else "right")
        for row in rows:
            table.add_row(*[str(cell) for cell in row])
        width = None if sys.stdout.isatty() else 140
        Console(width=width).print(table)

    def text(self, text: str = "") -> None:
        if not self.json:
            print(text)


def plain(value: Any) -> Any:
    """Dataclasses, paths and pydantic models as JSON-ready values; infinities and NaN become null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if hasattr(value, "model_dump"):
        return plain(value.model_dump())
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def setup_logging(quiet: bool) -> None:
    """The library's notes and warnings go to stderr in one form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("sedac: %(message)s"))
    logger = logging.getLogger("sedac")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.propagate = False


def on_interrupt(hint: str | None) -> None:
    """What to tell the user if they press Ctrl-C now."""
    global _resume_hint
    _resume_hint = hint


def report_error(error: SedacError, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"  try: {error.hint}", file=sys.stderr)
    return error.exit_code


def report_interrupt() -> int:
    print("\ninterrupted", file=sys.stderr)
    if _resume_hint:
        print(f"  to go on: {_resume_hint}", file=sys.stderr)
    return 130


def report_crash(error: Exception, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    first = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
    print(f"internal error: {type(error).__name__}: {first}", file=sys.stderr)
    if not debug:
        print("  try: the same command with --debug shows where; please report it with that output", file=sys.stderr)
    return 70
