"""Text in any common form -> samples of token ids, the same ones for the same seed, without holding the text.

A source gives documents; documents are shuffled in a seeded buffer, tokenized, and either packed (joined by the end-of-text
token and cut into full samples) or kept one per sample.

    samples = Corpus(TextSpec(dataset="builtin:books", samples=4), tokenizer).samples()
"""

from __future__ import annotations

import csv
import itertools
import json
import logging
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sedac_cli.config import TextSpec
from sedac_cli.errors import InputError
from sedac_cli.resources import data_dir

log = logging.getLogger("sedac")

BUILTIN = "builtin:"
SUFFIXES = (".txt", ".jsonl", ".parquet", ".csv")
UTF8 = "utf-8-sig"  # a byte order mark is not text
DOCUMENT_END = "<|endoftext|>"
TEXT_COLUMNS = ("text", "content", "document", "body", "prompt")
# The names people use for hub data sets that have moved or need a configuration.
HUB_ALIASES = {
    "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "wikitext-2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
}
SHUFFLE_BUFFER = 4096
BLOCK_CHARS = 8192
MAX_TOKEN_CHARS = 16  # more of a document is not tokenized than surely fills a sample


@dataclass(frozen=True)
class Corpus:
    spec: TextSpec
    tokenizer: Any

    def samples(self) -> Iterator[list[int]]:
        """At most `spec.samples` lists of 2..max_length token ids; fewer if the text ends, an error if there is none."""
        count = 0
        for sample in itertools.islice(self._all_samples(), self.spec.samples):
            count += 1
            yield sample
        if count == 0:
            raise InputError(
                f"{self.spec.dataset} gave no sample of at least 2 tokens",
                hint="check --dataset, --split and --text-column",
            )

    def batches(self, size: int) -> Iterator[list[list[int]]]:
        samples = self.samples()
        while batch := list(itertools.islice(samples, size)):
            yield batch

    def describe(self) -> dict[str, Any]:
        return asdict(self.spec)

    def _all_samples(self) -> Iterator[list[int]]:
        documents = read_documents(self.spec)
        if self.spec.pack:
            # Long documents are cut before they are shuffled, so that one book cannot fill every sample.
            pieces = itertools.chain.from_iterable(map(blocks, documents))
            return self._packed(shuffled(pieces, self.spec.seed) if self.spec.shuffle else documents)
        heads = (document[: self.spec.max_length * MAX_TOKEN_CHARS] for document in documents)
        return self._one_each(shuffled(heads, self.spec.seed) if self.spec.shuffle else heads)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _packed(self, documents: Iterable[str]) -> Iterator[list[int]]:
        length = self.spec.max_length
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        pending: list[int] = []
        for document in documents:
            pending += end if pending else []
            for block in blocks(document):
                pending += self._encode(block)
                while len(pending) >= length:
                    yield pending[:length]
                    pending = pending[length:]
        if len(pending) >= 2:
            yield pending

    def _one_each(self, documents: Iterable[str]) -> Iterator[list[int]]:
        dropped = 0
        for document in documents:
            ids = self._encode(document)[: self.spec.max_length]
            if len(ids) >= 2:
                yield ids
            else:
                dropped += 1
        if dropped:
            log.info("%d documents of fewer than 2 tokens were left out", dropped)


def pad_batch(samples: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids [B, T] and mask [B, T]."""
    width = max(map(len, samples))
    ids = torch.full((len(samples), width), pad, dtype=torch.long)
    mask = torch.zeros((len(samples), width), dtype=torch.long)
    for row, sample in enumerate(samples):
        ids[row, : len(sample)] = torch.tensor(sample)
        mask[row, : len(sample)] = 1
    return ids, mask


def blocks(document: str) -> Iterator[str]:
    """A long document in pieces that end at a paragraph, so that a whole book is never tokenized at once."""
    start = 0
    while start < len(document):
        end = start + BLOCK_CHARS
        if end < len(document):
            for mark in ("\n\n", "\n", " "):
                cut = document.rfind(mark, start + BLOCK_CHARS // 2, end)
                if cut > 0:
                    end = cut + (len(mark) if mark != " " else 0)
                    break
        yield document[start:end]
        start = end


def shuffled(documents: Iterable[str], seed: int) -> Iterator[str]:
    """Seeded order from a buffer."""
    rng = random.Random(seed)
    buffer: list[str] = []
    for piece in documents:
        if len(buffer) < SHUFFLE_BUFFER:
            buffer.append(piece)
            continue
        slot = rng.randrange(SHUFFLE_BUFFER)
        buffer[slot], piece = piece, buffer[slot]
        yield piece
    rng.shuffle(buffer)
    yield from buffer


def read_documents(spec: TextSpec) -> Iterator[str]:
    """Every non-empty document of a built-in text, a file, a folder or a hub data set."""
    if spec.dataset.startswith(BUILTIN):
        documents = _read_file(_builtin_text(spec), None)
    elif Path(spec.dataset).expanduser().exists():
        documents = _read_path(Path(spec.dataset).expanduser(), spec.text_column)
    elif spec.dataset.endswith(SUFFIXES) or spec.dataset.startswith((".", "/", "~")):
        raise InputError(f"no such file or folder: {spec.dataset}")
    else:
        documents = _read_hub(spec)
    return (document for document in documents if document.strip())


def _builtin_text(spec: TextSpec) -> Path:
    name = spec.dataset.removeprefix(BUILTIN)
    split = {None: "calibration", "train": "calibration", "validation": "evaluation", "test": "evaluation"}.get(
        spec.split, spec.split
    )
    path = data_dir() / "text" / f"{name}-{split}.txt"
    if not path.is_file():
        known = ", ".join(sorted(p.stem.replace("-", " --split ", 1) for p in (data_dir() / "text").glob("*.txt")))
        raise InputError(f"there is no built-in text '{name}' with split '{split}'", hint=f"built in: {known}")
    return path


def _read_path(path: Path, column: str | None) -> Iterator[str]:
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not files:
            raise InputError(f"{path} holds no {', '.join(SUFFIXES)} files")
    elif path.suffix.lower() in SUFFIXES:
        files = [path]
    else:
        raise InputError(f"{path}: expected one of {', '.join(SUFFIXES)}, found '{path.suffix}'")
    return itertools.chain.from_iterable(_read_file(file, column) for file in files)


def _read_file(path: Path, column: str | None) -> Iterator[str]:
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    reader = readers[path.suffix.lower()]
    try:
        yield from reader(path, column)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start} of what was read)") from None
    except csv.Error as error:
        raise InputError(f"{path} is not a CSV file: {error}") from None


def _read_txt(path: Path, column: str | None) -> Iterator[str]:
    """Documents are divided by a line holding the end-of-text mark; a file without one is one document."""
    lines: list[str] = []
    with path.open(encoding=UTF8) as handle:
        for line in handle:
            if line.strip() == DOCUMENT_END:
                yield "".join(lines)
                lines = []
            else:
                lines.append(line)
    yield "".join(lines)


def _read_jsonl(path: Path, column: str | None) -> Iterator[str]:
    with path.open(encoding=UTF8) as handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path} line {number} is not JSON: {error.msg}") from None
            if not isinstance(row, dict):
                raise InputError(f"{path} line {number}: expected an object, found {type(row).__name__}")
            column = column or pick_column(row, str(path))
            yield _text_of(row, column, f"{path} line {number}")


def _read_csv(path: Path, column: str | None) -> Iterator[str]:
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding=UTF8, newline="") as handle:
        for number, row in enumerate(csv.DictReader(handle), 2):
            column = column or pick_column(row, str(path))
            yield _text_of(row, column, f"{path} row {number}")


def _read_parquet(path: Path, column: str | None) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is not a parquet file: {str(error).splitlines()[0]}") from None
    example = {field.name: "" if _is_text(field.type) else 0 for field in file.schema_arrow}
    column = column or pick_column(example, str(path))
    if column not in example:
        raise _no_column(column, example, str(path))
    for batch in file.iter_batches(batch_size=256, columns=[column]):
        yield from (text for text in batch.column(0).to_pylist() if isinstance(text, str))


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _read_hub(spec: TextSpec) -> Iterator[str]:
    from datasets import load_dataset

    name, config = HUB_ALIASES.get(spec.dataset, (spec.dataset, None))
    try:
        rows = iter(load_dataset(name, config, split=spec.split or "train", streaming=True))
        first = next(rows, None)
    except Exception as error:  # the hub client raises a dozen unrelated classes for "not there" and "no network"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"cannot read data set '{spec.dataset}' from the hub: {reason}",
            hint="--dataset builtin:books needs no network; --dataset FILE takes .txt, .jsonl, .parquet or .csv",
        ) from None
    if first is None:
        return
    column = spec.text_column or pick_column(first, spec.dataset)
    for row in itertools.chain([first], rows):
        yield _text_of(row, column, spec.dataset)


def pick_column(row: dict[str, Any], where: str) -> str:
    """The usual name, or the only column of strings."""
    for name in TEXT_COLUMNS:
        if name in row and isinstance(row[name], str | None):  # an empty text may be null
            return name
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if len(strings) == 1:
        return strings[0]
    found = ", ".join(map(str, row)) or "none"
    raise InputError(f"{where}: cannot tell which column holds the text (columns: {found})", hint="--text-column NAME")


def _text_of(row: dict[str, Any], column: str, where: str) -> str:
    if column not in row:
        raise _no_column(column, row, where)
    value = row[column]
    return value if isinstance(value, str) else ""


def _no_column(column: str, row: dict[str, Any], where: str) -> InputError:
    return InputError(
        f"{where} has no column '{column}'", hint="--text-column with one of: " + ", ".join(map(str, row))
    )
