"""One small interface for every way of running a model: open a configuration, run prompts, judge quality.

backend = open_backend(matrix, model, seed)
with backend.open(experiment, cell, backend.engines(experiment)[0]) as session:
    run = session.run(prompts, new_tokens=32)
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

from sedac_cli.bench.engines import check_engines
from sedac_cli.bench.matrix import Experiment, Matrix
from sedac_cli.bench.metrics import Run
from sedac_cli.bench.workload import check_prompts
from sedac_cli.config import SHAPE, ModelSpec
from sedac_cli.corpus import Corpus
from sedac_cli.errors import UsageError


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

    def run(self, prompts: list[str], new_tokens: int) -> Run: ...

    def close(self) -> None: ...


class Backend(Protocol):
    name: str
    baseline: str
    """What dense figures are measured with, in words: they stand in every report. Of what was opened so far."""
    tokenizer: Any | None
    one_at_a_time: bool
    """Whether a configuration is dear to open: then all its cells are run before the next one is opened."""

    def describe(self) -> dict[str, Any]:
        """Model, device, precision, for `bench.json`; what only opening tells is there once something was opened."""
        ...

    def cells(self) -> list[Cell]: ...

    def prompts_per_run(self, cell: Cell) -> int: ...

    def engines(self, experiment: Experiment) -> list[str]:
        """Those it may run in, the first choice first. One that refuses by `InputError` gives way to the next."""
        ...

    def open(self, experiment: Experiment, cell: Cell, engine: str) -> AbstractContextManager[Session]: ...

    def aside(self, cell: Cell, engine: str, prompts: list[str]) -> dict[str, Any] | None:
        """The step of a slower way than dense in `engine`, for a note under the table: what one must not compare with."""
        ...

    def quality(self, experiment: Experiment, corpus: Corpus | None, prompts: list[str]) -> dict[str, Any] | None:
        """What the configuration does to the model's quality; None where it cannot change it."""
        ...

    def close(self) -> None: ...


def open_backend(matrix: Matrix, model: ModelSpec, seed: int) -> Backend:
    """What contradicts itself is refused first: a backend may take minutes to open."""
    check_engines(matrix)
    check_prompts(matrix)
    if matrix.backend != "hf" and model.ref.startswith(SHAPE):
        raise UsageError(f"--backend {matrix.backend} knows no {model.ref}", hint="--backend hf makes shapes")
    module = import_module(f"sedac_cli.bench.backends.{matrix.backend}")
    return module.open_backend(matrix, model, seed)


def offline_cells(matrix: Matrix) -> list[Cell]:
    return [Cell(b, length, matrix.new_tokens) for b in matrix.batch for length in matrix.prompt_lengths]
