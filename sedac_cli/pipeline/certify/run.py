"""Certified calibration: run a gate's settings from strict to loose, skips in force, and keep the loosest that is safe.

Always true: the settings and their order are fixed before any is run; each is tested at the full level; the first that
cannot be certified ends the test. So with the stated confidence the file that is written keeps its promise, for text whose
sequences come from where the calibration sequences came from, independently.

    report = certify(loaded, text, CertifyOptions(Harm("agreement", 0.98), gate="cascade"), folder)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sedac_cli.artifacts.files import make_folder
from sedac_cli.artifacts.manifest import MANIFEST
from sedac_cli.artifacts.thresholds import Promise, Thresholds
from sedac_cli.config import TextSpec
from sedac_cli.corpus import pad_batch
from sedac_cli.errors import InputError, UsageError
from sedac_cli.gates.base import Guards
from sedac_cli.gpu.reference import kl_of_logits, row_chunks
from sedac_cli.models import LoadedModel
from sedac_cli.pipeline import Progress, quiet_progress
from sedac_cli.pipeline.calibrate import write_thresholds
from sedac_cli.pipeline.certify.bounds import Array, fixed_sequence, needed_sequences, p_value
from sedac_cli.pipeline.certify.harm import Harm
from sedac_cli.pipeline.certify.ladder import Ladder, Rung, Site, make_ladder
from sedac_cli.pipeline.certify.text import Calibration, read_calibration
from sedac_cli.pipeline.data import CollectedData
from sedac_cli.runtime.plan import Plan, plan_from_thresholds
from sedac_cli.runtime.skip import skipping

WAVE = 4
"""Settings that share one dense pass. At most WAVE - 1 are run for nothing after the first that fails."""
COLUMNS = {"ppl": ("nll_dense", "nll_gated"), "agreement": ("agree",), "kl": ("kl",)}
"""What each measure needs per token: the others would cost several passes over the logits for nothing."""
TEXT = TextSpec(dataset="", samples=500)
"""No data set named: see `certify.text`."""


@dataclass(frozen=True)
class CertifyOptions:
    harm: Harm
    gate: str = "cascade"
    confidence: float = 0.95
    bound: str = "wsr"
    layers: tuple[int, ...] | None = None
    guards: Guards = field(default_factory=lambda: Guards(sinks=4))
    batch_size: int = 8
    seed: int = 0
    allow_overlap: bool = False
    out: Path | None = None

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise UsageError(
                f"a confidence of {self.confidence:g} does not lie between 0 and 1", hint="--confidence 0.95"
            )


@dataclass(frozen=True)
class CertifyReport:
    """`candidates`: what was tested, in order; `chosen` is the last that was certified, or None: never skip."""

    file: Path
    gate: str
    promise: str
    harm: str
    confidence: float
    bound: str
    sequences: int
    needed: int
    rungs: int
    chosen: dict[str, Any] | None
    candidates: list[dict[str, Any]]
    text: dict[str, Any]


def certify(
    loaded: LoadedModel,
    text: TextSpec,
    options: CertifyOptions,
    folder: Path,
    progress: Progress = quiet_progress,
) -> CertifyReport:
    """Write the thresholds file, whatever comes out: the loosest certified setting, or a gate that never skips."""
    path = options.out or folder / "thresholds.json"
    data = CollectedData.open(folder) if (folder / MANIFEST).exists() else None
    if data is not None:
        data.manifest.model.require_same(loaded.identity, str(folder))
    calibration = read_calibration(text, TEXT, loaded.tokenizer, data, options.allow_overlap)
    needed = enough_text(len(calibration.samples), options)
    make_folder(path.parent)
    site = Site(
        loaded.decoder, loaded.identity, options.guards, folder, path.parent, options.layers, options.seed
    )  # fmt: skip
    ladder = make_ladder(options.gate, site)
    candidates = run_ladder(loaded, ladder, calibration, options, path.parent, progress)
    passed = [row for row in candidates if row["certified"]]
    rung = ladder.rungs[len(passed) - 1] if passed else None
    thresholds = finished(rung, ladder, candidates, calibration, options)
    settings = {
        "max_harm": f"{options.harm.measure}={options.harm.limit:g}", "confidence": options.confidence,
        "bound": options.bound, "gate": options.gate, "out": str(path),
    }  # fmt: skip
    write_thresholds(thresholds, path, folder, settings)
    return CertifyReport(
        file=path,
        gate=ladder.gate,
        promise=options.harm.sentence,
        harm=str(options.harm),
        confidence=options.confidence,
        bound=options.bound,
        sequences=len(calibration.samples),
        needed=needed,
        rungs=len(ladder.rungs),
        chosen=passed[-1] if passed else None,
        candidates=candidates,
        text=calibration.describe(),
    )


def enough_text(sequences: int, options: CertifyOptions) -> int:
    """How many sequences even a harmless gate needs; fewer are refused before the model runs."""
    harm, delta = options.harm, 1 - options.confidence
    needed = needed_sequences(options.bound, harm.bound, delta, harm.harmless)
    if sequences < needed:
        raise InputError(
            f"{sequences} calibration sequences cannot certify {harm} with confidence {options.confidence:g}: "
            f"even a gate that does no harm needs {needed} (bound '{options.bound}')",
            hint=f"--samples {needed} or more, from a text that has them; or a looser limit",
        )
    return needed


def run_ladder(
    loaded: LoadedModel,
    ladder: Ladder,
    calibration: Calibration,
    options: CertifyOptions,
    seen_from: Path,
    progress: Progress = quiet_progress,
) -> list[dict[str, Any]]:
    """Rows of the tested settings: all certified but the last, unless the ladder ends certified."""
    rows: list[dict[str, Any]] = []
    delta = 1 - options.confidence
    for first in range(0, len(ladder.rungs), WAVE):
        wave = ladder.rungs[first : first + WAVE]
        plans = [plan_from_thresholds(rung.thresholds, seen_from, loaded.decoder, loaded.identity) for rung in wave]
        sums = measure(loaded, plans, calibration.samples, options.harm.measure, options.batch_size, progress)
        tested = [judge(rung, sum_, loaded.decoder.num_layers, options) for rung, sum_ in zip(wave, sums, strict=True)]
        passed = fixed_sequence([row["p"] for row in tested], delta)
        for number, row in enumerate(tested):
            row["certified"] = number < passed
        rows += tested[: passed + 1]
        if passed < len(wave):
            break
    return rows


def judge(rung: Rung, sums: dict[str, Array], num_layers: int, options: CertifyOptions) -> dict[str, Any]:
    """One setting: what it skipped, what harm it did, and the p-value of "the harm is above the limit"."""
    harm = options.harm
    losses = harm.losses(sums)
    # The bets see the sequences one by one: in a random order, a run of easy text at the start cannot win early.
    order = np.random.default_rng(options.seed).permutation(len(losses))
    return {
        **rung.setting,
        "skip_ratio": float(sums["skipped"].sum() / (sums["tokens"].sum() * num_layers)),
        "loss": float(losses.mean()),
        "value": harm.shown(float(losses.mean())),
        "p": p_value(options.bound, losses[order], harm.bound, 1 - options.confidence),
        "clipped_above": harm.clipped_above(sums),
        "neighbour_correlation": neighbour_correlation(losses),
    }


def neighbour_correlation(losses: Array) -> float:
    """Of each loss with the next in reading order: far from 0, sequences are not as independent as is assumed."""
    if len(losses) < 3 or losses[:-1].std() == 0 or losses[1:].std() == 0:
        return 0.0
    return float(np.corrcoef(losses[:-1], losses[1:])[0, 1])


def finished(
    rung: Rung | None,
    ladder: Ladder,
    candidates: list[dict[str, Any]],
    calibration: Calibration,
    options: CertifyOptions,
) -> Thresholds:
    """The chosen file with its promise. A gate that never skips keeps every promise, with certainty."""
    harm = options.harm
    promise = Promise(
        kind="certified",
        target={
            "measure": harm.measure,
            "limit": harm.limit,
            "clip": list(harm.clip),
            "promise": harm.sentence,
            "never_skips": rung is None,
        },
        confidence=options.confidence,
        calibration_sequences=len(calibration.samples),
        bound=harm.bound,
        candidates=candidates,
    )
    found_by = {
        "method": "learn then test, fixed sequence",
        "p_values": options.bound,
        "gate": options.gate,
        "rungs": len(ladder.rungs),
        "batch_size": options.batch_size,
        "seed": options.seed,
        **calibration.describe(),
    }
    chosen = ladder.never if rung is None else rung.thresholds
    return chosen.model_copy(update={"promise": promise, "found_by": found_by})


# The model ------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def measure(
    loaded: LoadedModel,
    plans: list[Plan],
    samples: list[list[int]],
    kind: str,
    batch_size: int,
    progress: Progress = quiet_progress,
) -> list[dict[str, Array]]:
    """For each plan, the sums that `Evaluation.per_sequence` gives, those the harm of this kind needs; one dense pass."""
    decoder = loaded.decoder
    names = ("tokens", "skipped", *COLUMNS[kind])
    sums = [{name: np.zeros(len(samples)) for name in names} for _ in plans]
    with progress(total=len(samples) * len(plans), desc="calibrate", unit="sample") as bar:
        for first in range(0, len(samples), batch_size):
            batch = samples[first : first + batch_size]
            ids, mask = (x.to(decoder.device) for x in pad_batch(batch, loaded.tokenizer.pad_token_id or 0))
            forward = partial(decoder.last_hidden, ids, None if bool(mask.all()) else mask)
            real = mask.bool()
            predicts = real[:, :-1] & real[:, 1:]
            dense = forward()[:, :-1][predicts]
            gated, skipped = [], []
            for plan in plans:
                with skipping(loaded.model, plan.gate, plan.standin, decoder=decoder, keep_passes=True) as run:
                    gated.append(forward()[:, :-1][predicts])
                skipped.append(run.passes[0].skipped[:, :-1][predicts])
            rows = _compare(dense, gated, ids[:, 1:][predicts], loaded, kind)
            row_of = predicts.nonzero()[:, 0].cpu().numpy()
            for number, columns in enumerate(rows):
                columns["skipped"] = skipped[number]
                part = {name: values.double().cpu().numpy() for name, values in columns.items()}
                part["tokens"] = np.ones(len(row_of))
                for name in names:
                    sums[number][name][first : first + len(batch)] = np.bincount(row_of, part[name], len(batch))
            bar.update(len(batch) * len(plans))
    return sums


def _compare(
    dense: Tensor, gated: list[Tensor], target: Tensor, loaded: LoadedModel, kind: str
) -> list[dict[str, Tensor]]:
    """Per predicted token, for each gated pass; the dense logits of a chunk are made once for all of them."""
    decoder = loaded.decoder
    parts: list[list[dict[str, Tensor]]] = [[] for _ in gated]
    for chunk in row_chunks(dense.shape[0], decoder.vocab_size):
        a = decoder.head(dense[chunk]).float()
        y = target[chunk].to(a.device)
        nll = torch.nn.functional.cross_entropy(a, y, reduction="none") if kind == "ppl" else None
        best = a.argmax(dim=-1)
        for number, hidden in enumerate(gated):
            b = decoder.head(hidden[chunk]).float()
            if nll is not None:
                row = {"nll_dense": nll, "nll_gated": torch.nn.functional.cross_entropy(b, y, reduction="none")}
            elif kind == "kl":
                row = {"kl": kl_of_logits(a, b)}
            else:
                top = b.max(dim=-1)  # NaN wins: broken logits agree with nothing
                row = {"agree": ((best == top.indices) & torch.isfinite(top.values)).float()}
            parts[number].append(row)
    return [{name: torch.cat([row[name] for row in rows]) for name in rows[0]} for rows in parts]
