"""The colours of tokens in a terminal: cool where all MLPs ran, warm where most were skipped.

style_of(skipped=14, num_layers=28)      # "yellow3"
"""

from __future__ import annotations

STEPS = ("deep_sky_blue1", "green3", "yellow3", "orange1", "red1")


def style_of(skipped: int, num_layers: int) -> str:
    return STEPS[min(len(STEPS) - 1, skipped * len(STEPS) // num_layers)]


def legend() -> list[tuple[str, str]]:
    """(label, style) of every step."""
    width = 100 // len(STEPS)
    return [(f"{i * width}-{(i + 1) * width} %", style) for i, style in enumerate(STEPS)]
