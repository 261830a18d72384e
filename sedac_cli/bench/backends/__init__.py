"""One small interface for every way of running a model: open a configuration, run prompts, judge quality.

with open_backend(matrix, model, seed) as backend, backend.open(experiment, cell) as session:
    run = session.run(prompts, new_tokens=32)
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

from sedac_cli.bench.matrix import Experiment, Matrix
from sedac_cli.bench.metrics import Run
from sedac_cli.config import ModelSpec
from sedac_cli.corpus import Corpus


@dataclass(frozen=True)
class Cell:
    """One amount of work. Offline: a batch of prompts of one length. Online: so many requests at once, or a rate."""

    batch: int
    prompt_length: int | None
    new_tokens: int
    rate: float | None = None

    @property
    def label(self) -> str:
        if self.rate is not None:
            return f"{self.rate:g} requests/s"
        if self.prompt_length is None:
            return f"{self.batch} at once"
        return f"batch {self.batch}, prompt {self.prompt_length}"


class Session(Protocol):
    """An opened configuration. `run` may be called any number of times."""

    engine: str

    def run(self, prompts: list[str], new_tokens: int) -> Run: ...

    def close(self) -> None: ...


class Backend(Protocol):
    name: str
    baseline: str
    """What dense figures are measured with, in words: they stand in every report."""
    tokenizer: Any | None
    one_at_a_time: bool
    """Whether a configuration is dear to open: then all its cells are run before the next one is opened."""

    def describe(self) -> dict[str, Any]:
        """Model, device, precision, for `bench.json`."""
        ...

    def cells(self) -> list[Cell]: ...

    def prompts_per_run(self, cell: Cell) -> int: ...

    def open(self, experiment: Experiment, cell: Cell) -> AbstractContextManager[Session]: ...

    def quality(self, experiment: Experiment, corpus: Corpus | None, prompts: list[str]) -> dict[str, Any] | None:
        """What the configuration does to the model's quality; None where it cannot change it."""
        ...

    def close(self) -> None: ...


def open_backend(matrix: Matrix, model: ModelSpec, seed: int) -> Backend:
    module = import_module(f"sedac_cli.bench.backends.{matrix.backend}")
    return module.open_backend(matrix, model, seed)


def offline_cells(matrix: Matrix) -> list[Cell]:
    return [Cell(b, length, matrix.new_tokens) for b in matrix.batch for length in matrix.prompt_lengths]
