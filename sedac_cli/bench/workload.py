"""The prompts of a run: real text cut to length, a file of one's own, or random tokens where only length matters.

prompts = Workload.of(matrix, tokenizer, seed=0).prompts(length=64, count=10)
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sedac_cli.bench.matrix import Matrix
from sedac_cli.config import TextSpec
from sedac_cli.corpus import Corpus, read_documents
from sedac_cli.errors import InputError, UsageError

SYNTHETIC = "synthetic"
CHARS_PER_TOKEN = 4  # of English text, where there is no tokenizer to ask


@dataclass(frozen=True)
class Workload:
    """`tokenizer` None: lengths are taken in characters, four to a token, and the server says what they were."""

    text: TextSpec
    tokenizer: Any | None
    given: tuple[str, ...]
    synthetic: bool
    seed: int

    @classmethod
    def of(cls, matrix: Matrix, tokenizer: Any | None, seed: int) -> Workload:
        text = TextSpec(matrix.dataset, split=matrix.split, seed=seed)
        synthetic = matrix.prompts == SYNTHETIC
        if synthetic and tokenizer is None:
            raise UsageError(
                "prompts 'synthetic' are random tokens: they need a tokenizer", hint="--model of the server"
            )
        given = () if matrix.prompts is None or synthetic else tuple(read_prompt_file(Path(matrix.prompts)))
        return cls(text, tokenizer, given, synthetic, seed)

    def describe(self) -> str:
        if self.given:
            return f"{len(self.given)} prompts of a file"
        return "random tokens" if self.synthetic else f"text of {self.text.dataset}, {self.text.split}"

    def prompts(self, length: int, count: int) -> list[str]:
        """`count` prompts of about `length` tokens; a text that is too short for so many gives them again."""
        if self.given:
            found = [self._cut(prompt, length) for prompt in self.given]
        elif self.synthetic:
            found = [self._random(length, self.seed + index) for index in range(count)]
        else:
            found = self._from_text(length, count)
        return [found[index % len(found)] for index in range(count)]

    def _cut(self, prompt: str, length: int) -> str:
        if self.tokenizer is None:
            return prompt[: length * CHARS_PER_TOKEN]
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return prompt if len(ids) <= length else self.tokenizer.decode(ids[:length])

    def _random(self, length: int, seed: int) -> str:
        assert self.tokenizer is not None
        special = set(self.tokenizer.all_special_ids)
        plain = [token for token in range(self.tokenizer.vocab_size) if token not in special]
        # Random tokens, read back as text, fall into more tokens than they were: cut until they are no longer too many.
        text = self.tokenizer.decode(random.Random(seed).choices(plain, k=length))
        for fewer in range(length):  # a character cut in two comes back as a mark of several tokens
            if len(self.tokenizer(text, add_special_tokens=False)["input_ids"]) <= length:
                break
            text = self._cut(text, length - fewer)
        return text

    def _from_text(self, length: int, count: int) -> list[str]:
        if self.tokenizer is None:
            return _cut_characters(self.text, length * CHARS_PER_TOKEN, count)
        corpus = Corpus(replace(self.text, samples=count, max_length=length), self.tokenizer)
        full = [ids for ids in corpus.samples() if len(ids) == length]
        if not full:
            raise InputError(f"{self.text.dataset} holds no {length} tokens", hint="shorter prompts, or another text")
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in full]


def _cut_characters(text: TextSpec, size: int, count: int) -> list[str]:
    found: list[str] = []
    for document in read_documents(text):
        for start in range(0, len(document) - size, size):
            found.append(document[start : start + size])
            if len(found) == count:
                return found
    if not found:
        raise InputError(f"{text.dataset} holds no {size} characters", hint="shorter prompts, or another text")
    return found


def check_prompts(matrix: Matrix) -> None:
    """A file of prompts that cannot be read, or holds none, is refused before a model is loaded."""
    if matrix.prompts not in (None, SYNTHETIC):
        read_prompt_file(Path(str(matrix.prompts)))


def read_prompt_file(path: Path) -> list[str]:
    """One prompt per line; a .jsonl file holds strings, or objects with a `prompt` or `text`."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read prompts from {path}: {error}") from None
    if path.suffix == ".jsonl":
        lines = [_prompt_of(line, f"{path} line {number}") for number, line in enumerate(lines, 1)]
    if not lines:
        raise InputError(f"{path} holds no prompt")
    return lines


def _prompt_of(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON: {error.msg}") from None
    found = (
        row
        if isinstance(row, str)
        else next((row[k] for k in ("prompt", "text") if k in row), None)
        if isinstance(row, dict)
        else None
    )
    if not isinstance(found, str) or not found.strip():
        raise InputError(f"{where}: expected a string, or an object with 'prompt' or 'text'")
    return found
