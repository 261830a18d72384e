"""The sequences a promise is certified on: other text than the collected, or what comes after it in the same text."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from sedac_cli.config import TextSpec
from sedac_cli.corpus import Corpus
from sedac_cli.errors import InputError, UsageError
from sedac_cli.pipeline.data import CollectedData
from sedac_cli.pipeline.validate import refuse_shared

OWN = ""
"""As a data set: the text that was collected from, its remaining sequences."""


@dataclass(frozen=True)
class Calibration:
    """`skipped` sequences of the text come before the first one used; `dropped` incomplete ones are left out."""

    text: TextSpec
    skipped: int
    dropped: int
    samples: list[list[int]]

    def describe(self) -> dict[str, Any]:
        return {"text": asdict(self.text), "skipped": self.skipped, "dropped": self.dropped}


def read_calibration(
    text: TextSpec, defaults: TextSpec, tokenizer: Any, data: CollectedData | None, allow_overlap: bool
) -> Calibration:
    """`text.dataset` OWN takes the collected text from where collecting stopped, or the built-in one without data."""
    skipped, wanted = 0, text.samples
    if text.dataset == OWN:
        if replace(text, samples=0, seed=0) != replace(defaults, samples=0, seed=0):
            raise UsageError("options of the text go with a text of your own", hint="name it: --dataset FILE")
        if data is None:
            text = replace(text, dataset=TextSpec().dataset)
        else:
            collected = TextSpec(**data.manifest.steps["collect"].settings["text"])
            skipped = collected.samples
            text = replace(collected, samples=skipped + wanted)
    found = list(itertools.islice(Corpus(text, tokenizer).samples(), skipped, None))
    # The last packed sequence of a text is what was left over: it does not weigh as much as the others.
    used = [sample for sample in found if not text.pack or len(sample) == text.max_length]
    if not used:
        raise InputError(
            f"{text.dataset} has no full sequence of {text.max_length} tokens"
            + (f" after the {skipped} that were collected" if skipped else ""),
            hint="other text: --dataset FILE, or --split",
        )
    if data is not None and not allow_overlap:
        refuse_shared(used, [data.token_ids.numpy()], str(data.folder))
    return Calibration(text, skipped, len(found) - len(used), used)


def read_again(described: Mapping[str, Any], tokenizer: Any) -> list[list[int]]:
    """The sequences a thresholds file was certified on."""
    text = TextSpec(**described["text"])
    return list(itertools.islice(Corpus(text, tokenizer).samples(), described["skipped"], None))
