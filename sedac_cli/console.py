"""What a person and a script see: stdout is data (tables or one JSON document), stderr is everything else.

Only `commands/` and `__main__` use this module; the library returns results and takes a progress factory.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import traceback
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from sedac_cli.artifacts.files import plain
from sedac_cli.errors import SedacError

_resume_hint: str | None = None
_debug = False


FIGURE = re.compile(r"^[-+<>= ]*([\d.,]+ ?(%|x|s|us|ms)?( \.\. )?)*$|^nan$")


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

        every = 0.2 if sys.stderr.isatty() else 10.0
        return partial(tqdm, file=sys.stderr, disable=self.quiet, dynamic_ncols=True, mininterval=every)

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
        from rich.text import Text

        table = Table(
            title=Text(title), caption=caption and Text(caption), title_justify="left", caption_justify="left"
        )
        cells = [[str(cell) for cell in row] for row in rows]
        for number, column in enumerate(columns):
            numeric = number > 0 and all(FIGURE.match(row[number]) for row in cells)
            table.add_column(Text(column), justify="right" if numeric else "left", overflow="fold")
        for row in cells:
            table.add_row(*map(Text, row))  # Text: square brackets are not markup
        width = None if sys.stdout.isatty() else 140
        Console(width=width).print(table)

    def text(self, text: str = "") -> None:
        if not self.json:
            print(text)


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


def set_debug(on: bool) -> None:
    """Show tracebacks. Known from the arguments at once, from the environment or YAML when the command starts."""
    global _debug
    _debug = on


def report_error(error: SedacError) -> int:
    if _debug:
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


def report_crash(error: Exception) -> int:
    if _debug:
        traceback.print_exc()
    first = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
    print(f"internal error: {type(error).__name__}: {first}", file=sys.stderr)
    if not _debug:
        print("  try: the same command with --debug shows where; please report it with that output", file=sys.stderr)
    return 70
