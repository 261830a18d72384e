"""What can go wrong, as the user meets it: one class per exit code, each with a hint that names the next step.

The library raises these; only the command line turns them into text and an exit code.

    raise InputError("layer 40 does not exist: the model has 28 layers", hint="use --layers 7,14,21")
"""

from __future__ import annotations


class SedacError(Exception):
    """Anything we know how to explain. `exit_code` is what the shell sees."""

    exit_code = 70

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint


class PromiseMissedError(SedacError):
    """The work was done and a quality limit the user set was not kept."""

    exit_code = 1


class UsageError(SedacError):
    """The command line, the environment or the YAML file asks for something that makes no sense."""

    exit_code = 2


class InputError(SedacError):
    """A file, a model, a data set or the machine is not what the command needs."""

    exit_code = 3


def did_you_mean(word: str, known: list[str]) -> str:
    """`" Did you mean 'cascade'?"`, or nothing when no known word is close."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean '{close[0]}'?" if close else ""
