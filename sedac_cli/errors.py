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


def ran_out(error: BaseException | None) -> str | None:
    """What was missing, if memory was, here or in what led to it. Names are compared, so that nothing heavy is loaded to say so."""
    while error is not None:
        if any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):  # torch's and CuPy's
            return "GPU memory"
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            return "memory"
        error = error.__cause__ or error.__context__
    return None


def no_room(error: BaseException, what: str, hint: str) -> InputError:
    """`what` was going on; the first line of what the library says has the sizes."""
    said = (str(error).strip().splitlines() or ["no size is told"])[0]
    return InputError(f"out of {ran_out(error)} {what}: {said}", hint)


def did_you_mean(word: str, known: list[str]) -> str:
    """`" Did you mean 'cascade'?"`, or nothing when no known word is close."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean '{close[0]}'?" if close else ""
