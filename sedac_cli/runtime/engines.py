"""Which engine generates: the graph engine where it can, the eager one elsewhere.

Always true: what is asked for by name runs or is refused; only `auto` falls back, and says so.

    result, used = generate_with("auto", loaded, plan, prompts, options)
    used.name, used.notes
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sedac_cli.errors import InputError, UsageError, did_you_mean
from sedac_cli.gates.deep import DeepThinking
from sedac_cli.models import LoadedModel, pick_device
from sedac_cli.runtime.generate import Generated, GenerateOptions, check_room, encode_prompts, generate
from sedac_cli.runtime.plan import Plan

ENGINES = ("auto", "eager", "graph")


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


def generate_with(
    engine: str,
    loaded: LoadedModel,
    plan: Plan,
    prompts: list[str],
    options: GenerateOptions,
    deep: DeepThinking | None = None,
) -> tuple[Generated, Used]:
    if engine == "graph":
        _refuse(False, deep is not None)
    if engine == "eager" or deep is not None or (engine == "auto" and loaded.device.type != "cuda"):
        return generate(loaded, plan.gate, prompts, options, plan.standin, deep=deep), Used("eager")
    from sedac_cli.runtime.graph import GraphEngine

    width = encode_prompts(loaded, prompts, options)["input_ids"].shape[1]
    check_room(loaded, width, options.max_new_tokens)  # before there is a cache of that size
    try:
        graph = GraphEngine(loaded, plan, batch=len(prompts), max_length=width + options.max_new_tokens)
        return graph.generate(prompts, options), Used("graph", graph.path, graph.notes)
    except InputError as error:
        if engine == "graph":
            raise
        note = f"the graph engine could not serve this: {error}"
    return generate(loaded, plan.gate, prompts, options, plan.standin), Used("eager", notes=[note])
