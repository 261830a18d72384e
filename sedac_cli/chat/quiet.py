"""A terminal that does not show what is typed while something else is being drawn. What was typed is kept for the prompt.

with typing_unseen(): draw()
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def typing_unseen() -> Iterator[None]:
    """Echoed keys would stand in the middle of the drawing and move it. Where there is no terminal, nothing happens."""
    if not sys.stdin.isatty():
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin.fileno())
    quiet = [*before]
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, before)
