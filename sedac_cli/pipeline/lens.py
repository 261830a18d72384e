"""Measure what the entropy gate stands on: mean and spread of the lens entropy at each layer it checks, on real text.

Always true: the model runs dense, and only tokens count that the gate may skip (no padding, no attention sinks).

    found = measure_lens(decoder, HeadLens(decoder), [17, 21], batches)     # batches of lists of token ids
    found.mean[17], found.sd[17]                                            # bits
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sedac_cli.artifacts.files import make_folder
from sedac_cli.artifacts.manifest import versions
from sedac_cli.artifacts.thresholds import GuardSettings, Promise, Thresholds
from sedac_cli.config import TextSpec
from sedac_cli.corpus import Corpus, pad_batch
from sedac_cli.errors import InputError, UsageError
from sedac_cli.gates.base import Guards, stricter
from sedac_cli.gates.entropy import EntropyGate
from sedac_cli.gates.lens import Lens
from sedac_cli.gates.options import parse_options
from sedac_cli.gates.registry import entropy_checks, entropy_gate, make_lens
from sedac_cli.models import LoadedModel
from sedac_cli.pipeline.calibrate import write_thresholds
from sedac_cli.pipeline.data import CollectedData
from sedac_cli.structure import Decoder

MEASURED = ("mean", "sd")
OWN_GUARDS = ("sinks", "first", "last")


@dataclass(frozen=True)
class LensStatistics:
    """By checked layer, in bits; `tokens` is how many were looked at."""

    mean: dict[int, float]
    sd: dict[int, float]
    tokens: int


@torch.inference_mode()
def measure_lens(
    decoder: Decoder, lens: Lens, checks: Sequence[int], batches: Iterable[list[list[int]]], sinks: int = 0
) -> LensStatistics:
    """Dense passes over batches of token ids; positions before `sinks` are left out."""
    lens = lens.to(decoder.device)
    sums = {layer: torch.zeros(2, dtype=torch.float64, device=decoder.device) for layer in checks}
    tokens = 0
    for batch in batches:
        ids, mask = (x.to(decoder.device) for x in pad_batch(batch, 0))
        keep = mask.bool()
        keep[:, :sinks] = False
        if not bool(keep.any()):
            continue
        tokens += int(keep.sum())
        with ExitStack() as hooks:
            for layer in checks:
                see = partial(_add, sums[layer], lens, layer, keep)
                hooks.callback(decoder.at_checkpoint(layer, see).remove)
            decoder.last_hidden(ids, None if bool(mask.all()) else mask)
    if tokens < 2:
        raise InputError(f"{tokens} tokens to measure the lens entropy on: at least 2 are needed", hint="more text")
    mean = {layer: float(total[0]) / tokens for layer, total in sums.items()}
    # Rounding can take a variance of nearly 0 below it; the gate divides by sd.
    spread = {layer: (float(total[1]) - tokens * mean[layer] ** 2) / (tokens - 1) for layer, total in sums.items()}
    return LensStatistics(mean, {layer: max(value, 1e-12) ** 0.5 for layer, value in spread.items()}, tokens)


def _add(sums: Tensor, lens: Lens, layer: int, keep: Tensor, hidden: Tensor) -> None:
    entropy = lens(layer, hidden[keep.to(hidden.device)]).double().to(sums.device)
    sums += torch.stack([entropy.sum(), entropy.square().sum()])


def entropy_options(argument: str) -> dict[str, Any]:
    """The options of an entropy gate whose `mean` and `sd` may be left out: then they are to be measured."""
    given = {part.partition("=")[0].strip() for part in argument.split(",")}
    options = [option for option in EntropyGate.options if option.name not in MEASURED or option.name in given]
    told = parse_options(argument, options, "gate 'entropy'")
    return dict.fromkeys(MEASURED) | told


def measure_entropy_gate(
    told: dict[str, Any], decoder: Decoder, guards: Guards, batches: Iterable[list[list[int]]]
) -> tuple[dict[str, Any], LensStatistics | None]:
    """The options with `checks`, `mean` and `sd` filled in, and what was measured (None: nothing was missing)."""
    checks = entropy_checks(told, decoder, guards)
    filled = told | {"checks": checks}
    if all(told[name] is not None for name in MEASURED):
        return filled, None
    if not checks:
        raise InputError(
            f"gate 'entropy' with these options checks no layer of this model of {decoder.num_layers} layers: "
            "there is nothing to measure",
            hint="a lower threshold, min_exit_layer or anchor_interval, or checks=LAYER/LAYER",
        )
    found = measure_lens(decoder, make_lens(told["lens"], decoder, checks), checks, batches, guards.sinks)
    measured = {"mean": list(found.mean.values()), "sd": list(found.sd.values())}
    return filled | {name: values for name, values in measured.items() if told[name] is None}, found


@dataclass(frozen=True)
class LensReport:
    """`layers` in bits; what they were measured on is in the file."""

    file: Path
    gate: str
    tokens: int
    layers: list[dict[str, float]]


def calibrate_entropy(
    loaded: LoadedModel,
    argument: str,
    text: TextSpec | CollectedData,
    guards: Guards,
    path: Path,
    folder: Path,
    batch_size: int = 8,
) -> LensReport:
    """Measure mean and sd for `entropy:ARGUMENT` on a text, or on what was collected, and write a thresholds file."""
    told = entropy_options(argument)
    if any(told[name] is not None for name in MEASURED):
        raise UsageError("gate 'entropy': mean and sd are what is measured here", hint="leave them out")
    guards = stricter(guards, Guards(**{name: told.pop(name) for name in OWN_GUARDS}))
    make_folder(path.parent)
    if isinstance(text, CollectedData):
        text.manifest.model.require_same(loaded.identity, str(text.folder))
        source: dict[str, Any] = text.manifest.steps["collect"].settings["text"]
        batches: Iterable[list[list[int]]] = collected_batches(text, batch_size)
    else:
        source, batches = asdict(text), Corpus(text, loaded.tokenizer).batches(batch_size)
    told, found = measure_entropy_gate(told, loaded.decoder, guards, batches)
    assert found is not None
    entropy_gate(told, loaded.decoder, guards)  # what it refuses is not written
    layers = [{"layer": layer, "mean": found.mean[layer], "sd": found.sd[layer]} for layer in found.mean]
    thresholds = Thresholds(
        gate="entropy", layers=[], thresholds=[], probes={}, target_label="none", model=loaded.identity,
        parameters={key: value for key, value in told.items() if value is not None},
        guards=GuardSettings(**asdict(guards)),
        found_by={
            "method": "mean and standard deviation of the lens entropy (bits) over dense states, attention sinks left out",
            "tokens": found.tokens, "layers": layers, "text": source, "versions": versions(),
        },
        promise=Promise(kind="none", target={}),
    )  # fmt: skip
    write_thresholds(thresholds, path, folder, {"gate": f"entropy:{argument}", "out": str(path)})
    return LensReport(path, "entropy", found.tokens, layers)


def collected_batches(data: CollectedData, size: int = 8) -> Iterator[list[list[int]]]:
    """The sequences of a collection, as they were run."""
    _, lengths = torch.unique_consecutive(data.sequence_ids, return_counts=True)
    sequences = [part.tolist() for part in data.token_ids.split(lengths.tolist())]
    for first in range(0, len(sequences), size):
        yield sequences[first : first + size]
