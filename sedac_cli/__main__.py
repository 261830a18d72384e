"""`sedac` and `python -m sedac_cli`: run the command line and turn every outcome into an exit code.

0 done, 1 a quality limit was missed, 2 wrong usage, 3 bad input or environment, 70 a fault of ours, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import typer

from sedac_cli.cli import app
from sedac_cli.console import report_crash, report_error, report_interrupt, set_debug
from sedac_cli.errors import InputError, SedacError, no_room, ran_out

# Typer may carry its own copy of click, so its exception classes are reached through Typer.
INTERRUPTED = 130
ROOM = "shorter texts, fewer at a time, --dtype bfloat16, --load-in-4bit or a smaller model"
ClickError: Any = typer.BadParameter.__mro__[2]


def main(argv: list[str] | None = None) -> None:
    code = run(sys.argv[1:] if argv is None else argv)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def run(args: list[str]) -> int:
    set_debug("--debug" in args)
    try:
        code = app(args=args, standalone_mode=False, prog_name="sedac")
        if code == INTERRUPTED:  # Typer has turned Ctrl-C into this code
            return report_interrupt()
        return code if isinstance(code, int) else 0
    except SedacError as error:
        return report_error(error)
    except SystemExit as stop:  # Typer's answer to a closed pipe: `sedac ... | head` has seen enough
        if isinstance(stop.__context__, BrokenPipeError):
            return 0
        raise
    except OSError as error:
        return report_error(as_input_error(error))
    except (KeyboardInterrupt, typer.Abort):
        return report_interrupt()
    except typer.Exit as stop:
        return stop.exit_code
    except ClickError as error:
        error.show()
        return error.exit_code
    except Exception as error:
        if ran_out(error):
            return report_error(no_room(error, "on this machine", ROOM))
        return report_crash(error)


def as_input_error(error: OSError) -> SedacError:
    """A full disk, a read-only folder or a missing file is the machine's state, not a fault of ours."""
    where = f": {error.filename}" if error.filename else ""
    return InputError(f"{error.strerror or error}{where}")


if __name__ == "__main__":
    main()
