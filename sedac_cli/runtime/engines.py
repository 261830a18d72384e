"""Which engine generates: the graph engine where it can, the eager one elsewhere.

Always true: what is asked for by name runs or is refused; only `auto` falls back, and says so.

    result, used = generate_with("auto", loaded, plan, prompts, options)
    used.name, used.notes
    texts = Generator("auto", loaded, plan)          # for many calls: texts(prompts, options)
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sedac_cli.errors import InputError, UsageError, did_you_mean
from sedac_cli.gates.deep import DeepThinking
from sedac_cli.models import LoadedModel, pick_device
from sedac_cli.runtime.generate import Generated, GenerateOptions, check_room, encode_prompts, generate
from sedac_cli.runtime.plan import Plan
from sedac_cli.runtime.stream import context_limit

if TYPE_CHECKING:
    from sedac_cli.runtime.graph import GraphEngine

ENGINES = ("auto", "eager", "graph")
COULD_NOT = "the graph engine could not serve this: "
SHORTEST = 256
"""Places of a cache that is to serve more than one call."""


@dataclass(frozen=True)
class Used:
    """`path`: how the graph engine ran its steps, `fused` or `generic`."""

    name: str
    path: str | None = None
    notes: list[str] = field(default_factory=list)


def require_engine(engine: str, device: str, *, lossless: bool = False, deep: bool = False) -> None:
    """What an engine asked for by name cannot do, or this machine lacks for it, said before a model is loaded, which may
    take minutes."""
    if engine not in ENGINES:
        raise UsageError(
            f"--engine: '{engine}' is not known.{did_you_mean(engine, list(ENGINES))}", hint=", ".join(ENGINES)
        )
    if engine == "graph":
        _refuse(lossless, deep)
        from sedac_cli.runtime.graph.capture import require_graphs

        require_graphs(pick_device(device))


def _refuse(lossless: bool, deep: bool) -> None:
    """What no graph engine does, whatever the machine."""
    if lossless:
        raise UsageError("lossless drafts run in the eager engine", hint="--engine eager, or leave --engine out")
    if deep:
        raise UsageError("deep thinking runs tokens again, which the graph engine does not", hint="--engine eager")


class Generator:
    """Texts by one engine, call after call. A graph engine is for a batch and a length: it is kept, with the graphs it has captured,
    for as long as calls fit it. `spare`: it is made with room for longer calls."""

    def __init__(
        self, engine: str, loaded: LoadedModel, plan: Plan, deep: DeepThinking | None = None, *, spare: bool = True
    ):
        if engine == "graph":
            _refuse(False, deep is not None)
        self.engine, self.loaded, self.plan, self.deep, self.spare = engine, loaded, plan, deep, spare
        self.eager = engine == "eager" or deep is not None or (engine == "auto" and loaded.device.type != "cuda")
        self.graph: GraphEngine | None = None
        self.refused: dict[tuple[int, int], str] = {}
        """Batches and lengths that `auto` need not try again, and why."""
        self.too_long: set[tuple[int, int]] = set()
        """Batches and lengths with room to spare that were refused."""

    def __call__(self, prompts: list[str], options: GenerateOptions) -> tuple[Generated, Used]:
        if self.eager:
            return self._eagerly(prompts, options), Used("eager")
        width = encode_prompts(self.loaded, prompts, options)["input_ids"].shape[1]
        check_room(self.loaded, width, options.max_new_tokens)  # before there is a cache of that size
        needed = width + options.max_new_tokens
        size = len(prompts), self._length(needed)
        note = self.refused.get(size) or self._refused_call(width, options)
        if note is None:
            try:
                graph = self._graph(*size, needed)
                return graph.generate(prompts, options), Used("graph", graph.path, graph.notes)
            except InputError as error:
                if self.engine == "graph":
                    raise
                note = self.refused[size] = COULD_NOT + str(error)
        return self._eagerly(prompts, options), Used("eager", notes=[note])

    def _refused_call(self, width: int, options: GenerateOptions) -> str | None:
        """Why this call alone cannot run there; another one of the same size may."""
        from sedac_cli.runtime.graph.refusals import refuse_call

        try:
            refuse_call(self.loaded, width, options)
        except InputError as error:
            if self.engine == "graph":
                raise
            return COULD_NOT + str(error)
        return None

    def _eagerly(self, prompts: list[str], options: GenerateOptions) -> Generated:
        return generate(self.loaded, self.plan.gate, prompts, options, self.plan.standin, deep=self.deep)

    def _length(self, needed: int) -> int:
        if not self.spare:
            return needed
        room = max(SHORTEST, 1 << (needed - 1).bit_length())
        return min(room, context_limit(self.loaded) or room)

    def _graph(self, batch: int, length: int, needed: int) -> GraphEngine:
        """For `length`, or, where that is refused (it may exceed a window that the text does not), for what is needed."""
        from sedac_cli.runtime.graph import GraphEngine

        if self.graph is not None and self.graph.batch == batch and self.graph.max_length >= needed:
            return self.graph
        self.graph = None
        gc.collect()  # its cache makes room first: its graphs and what they replay hold each other
        if length > needed and (batch, length) not in self.too_long:
            try:
                self.graph = GraphEngine(self.loaded, self.plan, batch=batch, max_length=length)
            except InputError:
                self.too_long.add((batch, length))
            gc.collect()
        if self.graph is None:
            self.graph = GraphEngine(self.loaded, self.plan, batch=batch, max_length=needed)
        return self.graph


def generate_with(
    engine: str,
    loaded: LoadedModel,
    plan: Plan,
    prompts: list[str],
    options: GenerateOptions,
    deep: DeepThinking | None = None,
) -> tuple[Generated, Used]:
    """Once, in a cache that is just long enough."""
    return Generator(engine, loaded, plan, deep, spare=False)(prompts, options)
