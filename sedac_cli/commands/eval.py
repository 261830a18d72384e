"""`sedac eval`: tasks of the lm-evaluation-harness, dense and gated side by side."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sedac_cli.commands._common import option, sedac_command
from sedac_cli.config import ModelSpec
from sedac_cli.console import Output
from sedac_cli.errors import UsageError

if TYPE_CHECKING:
    from sedac_cli.harness.run import EvalReport


@sedac_command(model=ModelSpec())
def eval_(
    out: Output,
    seed: int,
    model: ModelSpec,
    gate: Annotated[
        str, typer.Option("--gate", help="never, always:14, cascade:thresholds.json, learned:sedac_gates.pth@0.25.")
    ] = "never",
    tasks: Annotated[str, typer.Option("--tasks", help="Names of tasks or groups: arc_easy,hellaswag.")] = "",
    include_path: Annotated[
        Path | None, typer.Option("--include-path", help="Folder with task YAML files of your own.")
    ] = None,
    limit: Annotated[
        float | None, typer.Option("--limit", min=0, help="Documents per task; under 1, a share of them.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option("--num-fewshot", min=0, help="Examples before each question.")
    ] = None,
    batch_size: Annotated[str, typer.Option("--batch-size", help="A number, auto, or auto:N.")] = "8",
    max_length: Annotated[int | None, typer.Option("--max-length", min=2, help="Longest input in tokens.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
    dense: Annotated[
        bool, typer.Option("--dense/--no-dense", help="Run the dense model too, for the comparison.")
    ] = True,
    max_drop: Annotated[
        float | None,
        option("Limits", "--max-drop", min=0,
               help="Fail if any metric of any task loses more: points of one that should be high (0.02), "
               "a share of one that should be low (perplexity)."),
    ] = None,
    out_file: Annotated[Path, typer.Option("--out", help="Results with every document's values.")] = Path("eval.json"),
) -> None:  # fmt: skip
    """Run tasks of the lm-evaluation-harness with a gate in force, and without one, task by task."""
    if max_drop is not None and not dense:
        raise UsageError("--max-drop compares with the dense model", hint="leave --no-dense out")
    head, _, tail = batch_size.partition(":")
    if not (head.isdigit() and int(head) and not tail) and head != "auto":
        raise UsageError(f"--batch-size: '{batch_size}' is not a number", hint="8, auto or auto:4")
    if limit is not None and (limit == 0 or (limit >= 1 and limit != int(limit))):
        raise UsageError(f"--limit: {limit} documents", hint="a whole number, or a share under 1")
    from sedac_cli.artifacts.files import make_folder
    from sedac_cli.harness import require_harness
    from sedac_cli.models import load_model
    from sedac_cli.runtime.plan import check_spec, make_plan

    require_harness()
    check_spec(gate)
    make_folder(out_file.resolve().parent)
    # The harness prints and draws bars as it goes; stdout is for the result.
    talk = io.StringIO() if out.quiet else sys.stderr
    with contextlib.redirect_stdout(talk), contextlib.redirect_stderr(talk):
        from sedac_cli.harness.model import SedacLM
        from sedac_cli.harness.run import EvalOptions, check_drop, evaluate_tasks, find_tasks, write_evaluation

        names = [name.strip() for name in tasks.split(",") if name.strip()]
        manager = find_tasks(names, include_path)
        loaded = load_model(model)
        plan = make_plan(gate, loaded.decoder, loaded.identity, seed=seed)
        size = int(batch_size) if batch_size.isdigit() else batch_size
        lm = SedacLM(loaded.model, plan, tokenizer=loaded.tokenizer, batch_size=size, max_length=max_length)
        options = EvalOptions(include_path, limit, num_fewshot, dense, chat, seed)
        report = evaluate_tasks(lm, names, options, manager)
    document = write_evaluation(out_file, report)
    show(out, report, gate)
    out.text(f"wrote {out_file}")
    out.result(document)
    if max_drop is not None:
        check_drop(report, max_drop)


def show(out: Output, report: EvalReport, gate: str) -> None:
    rows = []
    for task in report.tasks:
        for name, metric in task.metrics.items():
            compared = ["-"] * 4
            if metric.dense is not None and metric.drop is not None:
                change = metric.gated - metric.dense
                loss = f"{change:+.4f}" if metric.higher_is_better else f"{metric.drop:+.2%}"
                counts = ["-" if count is None else str(count) for count in (metric.lost, metric.won)]
                compared = [_with_error(metric.dense, metric.dense_stderr), loss, *counts]
            rows.append(
                [task.task, name if metric.higher_is_better else f"{name} (low)", f"{task.samples:,}", compared[0],
                 _with_error(metric.gated, metric.gated_stderr), *compared[1:], f"{task.skip_ratio:.2%}"]
            )  # fmt: skip
    out.table(
        f"gate {gate}, task by task",
        ["task", "metric", "documents", "dense", "gated", "change", "worse", "better", "MLPs skipped"],
        rows,
        caption="+-: standard error as the harness gives it. low: is good, and its change relative. worse, better: documents "
        "whose own value changed.",
    )


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} +- {error:.4f}"
