"""A configuration and dense beside it, opened in the same engine: where the first choice refuses either, both take the next.

dense = Dense(backend, experiments[0], cell, stack, crashed)
with beside(backend, experiment, cell, dense) as pair:
    pair.own.run(prompts, 32), pair.dense.run(prompts, 32)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

from sedac_cli.bench.backends import Backend, Cell, Session
from sedac_cli.bench.matrix import Experiment
from sedac_cli.errors import InputError


@dataclass(frozen=True)
class Pair:
    """`dense` None: there is none, or it crashed. `refused`: engines that were tried before this one, and why they would not."""

    own: Session
    dense: Session | None
    engine: str
    refused: dict[str, str]


@dataclass
class Dense:
    """Dense in one cell: opened once in every engine that something beside it runs in, and kept open as long as `stack`."""

    backend: Backend
    experiment: Experiment
    cell: Cell
    stack: ExitStack
    crashed: Callable[[Exception], None]
    found: dict[str, Session | Exception] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)

    def session(self, engine: str, last: bool) -> Session | None:
        """A refusal is raised while another engine is left to try; anything else that fails is a crash, told once."""
        if engine not in self.found:
            try:
                self.found[engine] = self.stack.enter_context(self.backend.open(self.experiment, self.cell, engine))
            except Exception as error:
                self.found[engine] = error
        found = self.found[engine]
        if not isinstance(found, Exception):
            return found
        if isinstance(found, InputError) and not last:
            raise found
        if engine not in self.told:
            self.told.add(engine)
            self.crashed(found)
        return None


@contextlib.contextmanager
def beside(backend: Backend, experiment: Experiment, cell: Cell, dense: Dense | None) -> Iterator[Pair]:
    """Its own refusal is raised where no engine is left; dense's leaves it alone in the last one."""
    engines = backend.engines(experiment)
    refused: dict[str, str] = {}
    for engine in engines:
        last = engine == engines[-1]
        with ExitStack() as stack:
            try:
                own = stack.enter_context(backend.open(experiment, cell, engine))
                base = None if dense is None else dense.session(engine, last)
            except InputError as error:
                if last:
                    raise
                refused[engine] = error.message
                continue
            yield Pair(own, base, engine, refused)
            return
