"""Which engine each configuration is measured in, and what cannot be measured beside it.

Always true: a configuration and the dense beside it run in the same engine; what is asked for by name runs or is refused before
anything is loaded; only `auto` may take another engine, and what refused is in `bench.json`.

    check_engines(matrix)
    wanted_engine(matrix, experiment)       # "auto", "eager" or "graph"
"""

from __future__ import annotations

from sedac_cli.bench.matrix import Experiment, Matrix
from sedac_cli.errors import UsageError


def baseline_of(matrix: Matrix) -> Experiment | None:
    """The experiment that all others stand beside, where the matrix names one."""
    return next((experiment for experiment in matrix.experiments if experiment.is_baseline), None)


def wanted_engine(matrix: Matrix, experiment: Experiment) -> str:
    """What is asked for; an engine named for dense is that of all that name none."""
    asked = experiment.engine or matrix.engine
    if experiment.how.loop:
        return "eager"
    dense = baseline_of(matrix)
    return dense.engine if asked == "auto" and dense is not None and dense.engine is not None else asked


def check_engines(matrix: Matrix) -> None:
    """Refuse what contradicts itself."""
    {"hf": _check_own, "vllm": _check_vllm, "openai": _check_server}[matrix.backend](matrix)


def _check_own(matrix: Matrix) -> None:
    dense = baseline_of(matrix)
    for experiment in matrix.experiments:
        if experiment.how.loop and (experiment.engine or matrix.engine) == "graph":
            raise UsageError(
                f"'{experiment.name}' is asked for in engine graph: lossless drafts run in the eager engine",
                hint='--engine eager, or auto; in a matrix also "engine": "eager" for this experiment',
            )
        own = wanted_engine(matrix, experiment)
        if dense is not None and dense.engine not in (None, "auto", own) and own != "auto":
            raise UsageError(
                f"'{dense.name}' is asked for in engine {dense.engine} and '{experiment.name}' runs in {own}: a speed-up is "
                "measured in one engine",
                hint=f"no engine for '{dense.name}': it is measured in the engine of each configuration beside it",
            )


def _check_vllm(matrix: Matrix) -> None:
    """Engines of dense and of the configuration live side by side, with the same arguments."""
    for experiment in matrix.experiments:
        if experiment.engine is not None and (experiment.engine == "eager") != (matrix.engine == "eager"):
            raise UsageError(
                f"'{experiment.name}' is asked for in engine {experiment.engine}, the others in {matrix.engine}: a speed-up is "
                "measured in one engine",
                hint="--engine eager is for all of a run by --backend vllm",
            )


def _check_server(matrix: Matrix) -> None:
    for name, engine in (("", matrix.engine), *((f"'{x.name}': ", x.engine) for x in matrix.experiments)):
        if engine not in (None, "auto"):
            raise UsageError(
                f"{name}engine {engine} does not reach a server, whose engine is its own",
                hint='leave --engine (in a matrix "engine") out',
            )
