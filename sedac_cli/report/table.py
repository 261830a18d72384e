"""A table of the page, and how its numbers are written.

Table(["gate", "MLPs skipped"], [["always:14", share(0.5)]])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def interval(span: Any) -> str:
    return "-" if not span else " .. ".join("inf" if x is None else f"{x:.4f}" for x in span)


def spread(value: dict[str, Any] | None, unit: str) -> str:
    if not value or value.get("median") is None:
        return "-"
    digits = 3 if unit else 1
    text = f"{value['median']:,.{digits}f}{unit}"
    if value.get("low") is not None:
        text += f" ({value['low']:,.{digits}f} .. {value['high']:,.{digits}f})"
    elif value.get("n"):
        text += f" (n = {value['n']})"
    return text


def milliseconds(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value * 1000:.{digits}f} ms"
