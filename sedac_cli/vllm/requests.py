"""What a single request may ask for: no skipping at all, or a stricter threshold than the server's. Never a looser one.

SamplingParams(extra_args={"sedac": 0})                  # every MLP of this request runs
SamplingParams(extra_args={"sedac_threshold": 0.3})      # HTTP: "vllm_xargs": {"sedac_threshold": 0.3}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sedac_cli.errors import UsageError, did_you_mean

SWITCH, THRESHOLD = "sedac", "sedac_threshold"
KNOWN = [SWITCH, THRESHOLD]
WORDS = {"on": True, "off": False, "1": True, "0": False, "true": True, "false": False}


@dataclass(frozen=True)
class Wish:
    """`dense`: every MLP of the request runs. `threshold`: held beside the gate's own; the stricter of the two counts."""

    dense: bool = False
    threshold: float | None = None


DEFAULT = Wish()
DENSE = Wish(dense=True)


def read_wish(extra_args: Mapping[str, Any] | None) -> Wish:
    """The wish of a request, or why it makes no sense."""
    if not extra_args:
        return DEFAULT
    ours = {name: value for name, value in extra_args.items() if str(name).startswith(SWITCH)}
    for name in ours:
        if name not in KNOWN:
            raise UsageError(
                f"a request has no option '{name}'.{did_you_mean(str(name), KNOWN)}",
                hint="options: " + ", ".join(KNOWN),
            )
    switch, threshold = ours.get(SWITCH), ours.get(THRESHOLD)
    on = True
    if switch is not None:
        word = str(switch).lower()
        if isinstance(switch, (list, dict)) or word not in WORDS:
            raise UsageError(f"sedac={switch!r} in a request: expected 0 or 1")
        on = WORDS[word]
    if threshold is None:
        return DEFAULT if on else DENSE
    try:
        value = math.nan if isinstance(threshold, bool) else float(threshold)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"sedac_threshold={threshold!r} in a request: expected a finite number")
    return Wish(dense=not on, threshold=value) if on else DENSE


def wish_or_dense(extra_args: Mapping[str, Any] | None) -> Wish:
    """For where a request can no longer be refused: nonsense runs every MLP."""
    try:
        return read_wish(extra_args)
    except UsageError:
        return DENSE
