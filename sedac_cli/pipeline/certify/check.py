"""Measure a certified promise again, on other text: what was promised beside what was found.

check = check_promise(thresholds.promise, evaluation.per_sequence())
check.kept
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sedac_cli.artifacts.thresholds import Promise, Thresholds
from sedac_cli.config import TextSpec
from sedac_cli.corpus import Corpus
from sedac_cli.errors import InputError
from sedac_cli.pipeline.certify.harm import Array, Harm
from sedac_cli.pipeline.certify.text import read_again
from sedac_cli.pipeline.validate import refuse_shared

log = logging.getLogger("sedac")


@dataclass(frozen=True)
class PromiseCheck:
    """`measured`: the clipped mean that was promised, in the limit's unit; `calibrated`: the same on the calibration text.
    `interval`: bootstrap over sequences. The verdict is on the point estimate."""

    harm: str
    promise: str
    confidence: float | None
    limit: float
    calibrated: float | None
    measured: float
    interval: tuple[float, float]
    sequences: int
    clipped_above: int
    kept: bool


def check_promise(
    promise: Promise, sums: Mapping[str, Array], *, packed: bool = True, seed: int = 0, draws: int = 1000
) -> PromiseCheck | None:
    """None when nothing about quality was promised. `sums` as `Evaluation.per_sequence` gives them."""
    if promise.kind != "certified":
        return None
    harm = Harm.from_target(promise.target)
    if packed:  # the last packed sequence is a left-over, as in calibration
        full = sums["tokens"] == sums["tokens"].max()
        sums = {name: values[full] for name, values in sums.items()}
    losses = harm.losses(sums)
    picks = np.random.default_rng(seed).integers(0, len(losses), size=(draws, len(losses)))
    ends = sorted(harm.shown(float(x)) for x in np.quantile(losses[picks].mean(axis=1), [0.025, 0.975]))
    measured = harm.shown(float(losses.mean()))
    certified = [row for row in promise.candidates or [] if row["certified"]]
    return PromiseCheck(
        harm=str(harm),
        promise=harm.sentence,
        confidence=promise.confidence,
        limit=harm.limit,
        calibrated=certified[-1]["value"] if certified else None,
        measured=measured,
        interval=(ends[0], ends[1]),
        sequences=len(losses),
        clipped_above=harm.clipped_above(sums),
        kept=harm.kept(measured),
    )


def refuse_calibrated(thresholds: Thresholds, text: TextSpec, tokenizer: Any, where: str) -> None:
    """Refuse text that the promise was certified on. Where that text can no longer be read, a warning says so."""
    if thresholds.promise.kind != "certified":
        return
    try:
        known = read_again(thresholds.found_by, tokenizer)
    except InputError as error:
        log.warning("cannot tell whether this is the text %s was calibrated on: %s", where, error.message)
        return
    if known:
        refuse_shared(Corpus(text, tokenizer).samples(), known, where)
