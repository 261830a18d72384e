"""What a gate can be told: name, default, range and meaning of each option, and the `key=value,...` form users write.

One description serves parsing, files, error messages and the table of `sedac ls gates`. Nothing here imports torch.

    parse_options("k=3,tau=0.95", StabilityGate.options, "gate 'stability'")      # {"k": 3, "tau": 0.95}
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sedac_cli.errors import UsageError, did_you_mean

REQUIRED = object()


@dataclass(frozen=True)
class Option:
    """One value a gate takes. `kind`: int, float, str, or list (numbers; one number stands for a list of one)."""

    name: str
    kind: type
    default: Any
    meaning: str
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    """The lower end itself is not allowed."""
    choices: tuple[str, ...] = ()

    @property
    def range(self) -> str:
        if self.choices:
            return " or ".join(self.choices)
        if self.kind is str:
            return "text"
        whole = "whole numbers " if self.kind is int else ""
        if self.low == -math.inf and self.high == math.inf:
            return whole + "any"
        if self.high == math.inf:
            return f"{whole}{'>' if self.open_low else '>='} {self.low:g}"
        if self.open_low:
            return f"{whole}> {self.low:g}, up to {self.high:g}"
        return f"{whole}{self.low:g} .. {self.high:g}"

    @property
    def shown_default(self) -> str:
        if self.default is REQUIRED:
            return "required"
        if isinstance(self.default, (list, tuple)):
            return "/".join(f"{value:g}" for value in self.default)
        return "-" if self.default is None else str(self.default)

    def check(self, value: Any, where: str) -> Any:
        """The value in its own type, or why it cannot be one."""
        if self.kind is list:
            items = value if isinstance(value, (list, tuple)) else [value]
            return [self._number(item, where, float) for item in items]
        if self.kind is str:
            if self.choices and value not in self.choices:
                close = did_you_mean(str(value), list(self.choices))
                raise UsageError(f"{where}: {self.name} is {self.range}, not '{value}'.{close}")
            return str(value)
        return self._number(value, where, self.kind)

    def parse(self, text: str, where: str) -> Any:
        return self.check(text.split("/") if self.kind is list else text, where)

    def _number(self, value: Any, where: str, kind: type) -> Any:
        try:
            number = kind(value)
            exact = kind is not int or float(value) == number
        except (TypeError, ValueError):
            exact = False
        if not exact or isinstance(value, bool):
            form = "a whole number" if kind is int else "a number"
            raise UsageError(f"{where}: {self.name}={value} is not {form}")
        if not (self.low <= number <= self.high) or (self.open_low and number == self.low):
            raise UsageError(f"{where}: {self.name}={value} is out of range", hint=f"{self.name}: {self.range}")
        return number


def check_options(values: Mapping[str, Any], options: Sequence[Option], where: str) -> dict[str, Any]:
    """Known names, values in range, defaults filled in; the first thing wrong is said."""
    known = {option.name: option for option in options}
    for name in values:
        if name not in known:
            raise UsageError(
                f"{where} has no option '{name}'.{did_you_mean(name, list(known))}",
                hint="options: " + (", ".join(known) or "none"),
            )
    missing = [option.name for option in options if option.default is REQUIRED and option.name not in values]
    if missing:
        raise UsageError(
            f"{where} needs {' and '.join(missing)}", hint=f"write {','.join(f'{m}=...' for m in missing)}"
        )
    return {
        name: option.check(values[name], where) if name in values else option.default for name, option in known.items()
    }


def parse_options(text: str, options: Sequence[Option], where: str) -> dict[str, Any]:
    """`"k=3,tau=0.95"` -> checked values with defaults; lists are written 6.1/5.2/4."""
    given: dict[str, Any] = {}
    known = {option.name: option for option in options}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, sign, value = (piece.strip() for piece in part.partition("="))
        if not sign or not value:
            raise UsageError(f"{where}: '{part}' is not of the form key=value", hint="options: " + ", ".join(known))
        if name in given:
            raise UsageError(f"{where} names '{name}' twice")
        given[name] = known[name].parse(value, where) if name in known else value
    return check_options(given, options, where)
