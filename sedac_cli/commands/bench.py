"""`sedac bench`: measure configurations beside dense; `sedac bench compare`: what changed between two runs."""

from __future__ import annotations

import inspect
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sedac_cli.commands._common import option, sedac_command
from sedac_cli.config import ModelSpec, parse_list, split_gates
from sedac_cli.console import Output, on_interrupt
from sedac_cli.errors import InputError, PromiseMissedError, UsageError
from sedac_cli.hub import go_offline_if_unreachable, is_hub_ref

if TYPE_CHECKING:
    from sedac_cli.bench.matrix import Matrix

app = typer.Typer(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
WORK, LOAD, LIMITS = "Work", "Online load", "Limits (a miss is exit code 1)"


@sedac_command(model=ModelSpec(ref=""))
def measure(
    out: Output,
    seed: int,
    model: ModelSpec,
    matrix: Annotated[str | None, typer.Option(
        "--matrix", help="builtin:speed, quality, gates or speculation, or a JSON file; options given here win over it.")] = None,
    gates: Annotated[str | None, typer.Option(
        "--gates", help="Gates to measure: always:14,random:0.3,learned:sedac_gates.pth@0.25")] = None,
    modes: Annotated[str | None, typer.Option(
        "--modes", help="How each gate runs: gated, lossless, ngram_sedac_adaptive; default gated.")] = None,
    draft_tokens: Annotated[int | None, typer.Option("--draft-tokens", min=1, max=64, help="Draft length of lossless modes.")] = None,
    backend: Annotated[str | None, typer.Option("--backend", help="hf, vllm or openai (any compatible server).")] = None,
    engine: Annotated[str | None, typer.Option("--engine", help="auto, eager or graph; default auto: graph on a GPU.")] = None,
    shape: Annotated[str | None, typer.Option(
        "--shape", help="Random weights in the shape of qwen2.5-0.5b, qwen2.5-3b, qwen2.5-7b, qwen3-8b or llama-3.1-8b: speed without "
        "weights, said so.")] = None,
    batch: Annotated[str | None, option(WORK, "--batch", help="Batch sizes: 1,8; default 1.")] = None,
    prompt_lengths: Annotated[str | None, option(WORK, "--prompt-lengths", help="Prompt lengths in tokens: 64,512; default 64.")] = None,
    new_tokens: Annotated[int | None, option(WORK, "--new-tokens", min=1, help="Tokens generated per prompt; default 32.")] = None,
    repeats: Annotated[int | None, option(WORK, "--repeats", min=1, help="Pairs dense / own in every cell; default 5.")] = None,
    warmup: Annotated[int | None, option(WORK, "--warmup", min=0, help="Runs that are not counted; default 1.")] = None,
    dataset: Annotated[str | None, option(WORK, "--dataset", help="Text for prompts and quality.")] = None,
    split: Annotated[str | None, option(WORK, "--split", help="Split of a hub or built-in data set.")] = None,
    prompts: Annotated[str | None, option(WORK, "--prompts", help="A file of prompts instead, or 'synthetic'.")] = None,
    quality_samples: Annotated[int | None, option(
        WORK, "--quality-samples", min=0, help="Samples on which quality is measured; 0 measures none.")] = None,
    tasks: Annotated[str | None, option(WORK, "--tasks", help="lm-eval tasks, scored dense and gated.")] = None,
    task_folder: Annotated[str | None, option(WORK, "--task-folder", "--include-path", help="Task files (YAML) of your own.")] = None,
    task_limit: Annotated[int | None, option(WORK, "--task-limit", min=1, help="Documents per task.")] = None,
    url: Annotated[str | None, option(LOAD, "--url", help="Server to measure: http://127.0.0.1:8000/v1")] = None,
    baseline_url: Annotated[str | None, option(LOAD, "--baseline-url", help="A dense server to pair it with.")] = None,
    concurrency: Annotated[str | None, option(LOAD, "--concurrency", help="Requests at once: 1,4,16")] = None,
    rates: Annotated[str | None, option(LOAD, "--request-rates", help="Requests per second instead: 2,8")] = None,
    requests: Annotated[int | None, option(LOAD, "--requests", min=1, help="Requests per run.")] = None,
    request_timeout: Annotated[float | None, option(LOAD, "--request-timeout", min=0.01, help="Seconds per request.")] = None,
    max_ppl_ratio: Annotated[float | None, option(LIMITS, "--max-ppl-ratio", min=0, help="Of every gated configuration.")] = None,
    min_agreement: Annotated[float | None, option(LIMITS, "--min-agreement", min=0, max=1, help="Likewise.")] = None,
    min_speedup: Annotated[float | None, option(LIMITS, "--min-speedup", min=0, help="Of every configuration, in every cell.")] = None,
    min_ar: Annotated[float | None, option(LIMITS, "--min-ar", min=0, max=1, help="Acceptance rate of drafts.")] = None,
    min_trr: Annotated[float | None, option(LIMITS, "--min-trr", min=0, max=1, help="Token recovery rate.")] = None,
    save_dir: Annotated[Path, typer.Option("--save-dir", help="Folder for bench.json, report.md and report.html.")] = Path("sedac_bench"),
) -> None:  # fmt: skip
    """Measure configurations beside dense: speed in interleaved pairs, quality in the same run, every raw sample kept."""
    from sedac_cli.artifacts.files import folder_lock, make_folder
    from sedac_cli.bench.matrix import make_matrix, read_matrix

    if shape is not None:
        if model.ref:
            raise UsageError("--shape makes the model: --model does not go with it")
        model = replace(model, ref=f"shape:{shape}")
        quality_samples = quality_samples or 0
        prompts = prompts or "synthetic"
    changes: dict[str, Any] = {
        "base_model": model.ref or None, "backend": backend, "engine": engine, "new_tokens": new_tokens, "repeats": repeats,
        "warmup": warmup, "dataset": dataset, "split": split, "prompts": prompts, "base_url": url, "requests": requests,
        "request_timeout": request_timeout, "batch": parse_list(batch, int, "batch"),
        "prompt_lengths": parse_list(prompt_lengths, int, "prompt-lengths"),
        "concurrency": parse_list(concurrency, int, "concurrency"),
        "request_rates": parse_list(rates, float, "request-rates"),
    }  # fmt: skip
    if dataset is not None and split is None:
        changes["split"] = None if not dataset.startswith("builtin:") else "validation"
    quality = {
        "samples": quality_samples, "tasks": [name.strip() for name in tasks.split(",")] if tasks else None,
        "task_folder": task_folder, "task_limit": task_limit,
    }  # fmt: skip
    limits = {"max_ppl_ratio": max_ppl_ratio, "min_agreement": min_agreement, "min_speedup": min_speedup,
              "min_ar": min_ar, "min_trr": min_trr}  # fmt: skip
    if matrix is not None and any(value is not None for value in (gates, modes, draft_tokens, baseline_url)):
        raise UsageError(
            "--matrix already says what to measure: --gates, --modes, --draft-tokens and --baseline-url do not go with it"
        )
    named = [] if matrix is not None else named_experiments(gates, modes, draft_tokens, url, baseline_url)
    start = read_matrix(matrix).model_dump(exclude_unset=True) if matrix else {}
    document = start | {k: v for k, v in changes.items() if v is not None}
    if dataset is not None:
        document["split"] = changes["split"]
    if named:
        document["experiments"] = named
    elif matrix is None:
        document["experiments"] = [{"name": "dense", "mode": "dense"}]
    for part, given in (("quality", quality), ("thresholds", limits)):
        document[part] = document.get(part, {}) | {k: v for k, v in given.items() if v is not None}
    if url is not None and "backend" not in document:
        document["backend"] = "openai"
    load = {"--url": url, "--concurrency": concurrency, "--request-rates": rates, "--requests": requests,
            "--request-timeout": request_timeout}  # fmt: skip
    if document.get("backend", "hf") in ("hf", "vllm") and any(value is not None for value in load.values()):
        name = next(name for name, value in load.items() if value is not None)
        raise UsageError(
            f"{name} is load on a server, --backend {document.get('backend', 'hf')} is none",
            hint="--backend openai --url ...",
        )
    if document.get("backend") == "openai" and matrix is None and max_ppl_ratio is None:
        document["quality"].setdefault("samples", 0)  # few servers tell the log-probabilities that it takes
    plan = make_matrix(document)  # what a file says has been read: what does not fit now is an option's
    if any(map(is_hub_ref, (plan.base_model, plan.dataset))):
        go_offline_if_unreachable()
    make_folder(save_dir)
    on_interrupt(f"what was finished is in {save_dir}; the same command measures anew")
    with folder_lock(save_dir):
        run(out, plan, model, seed, save_dir)


def run(out: Output, plan: Matrix, model: ModelSpec, seed: int, save_dir: Path) -> None:
    from sedac_cli.bench.backends import open_backend
    from sedac_cli.bench.document import write_document
    from sedac_cli.bench.runner import run_matrix
    from sedac_cli.bench.tables import describe_miss, tables, write_report

    def save(document: dict[str, Any]) -> None:
        write_document(save_dir, document)
        write_report(save_dir / "report.md", document)

    backend = open_backend(plan, replace(model, ref=plan.base_model), seed)
    try:
        if plan.random_weights:
            out.note(f"{plan.base_model}: RANDOM weights. Speed is measured, texts and quality mean nothing.")
        found = run_matrix(
            plan, backend, seed, command=["sedac", *sys.argv[1:]], save=save, note=out.note, progress=out.progress()
        )
    finally:
        backend.close()
    for table in tables(found):
        if table.long:
            continue
        out.table(table.title, table.columns, table.rows, table.caption)
    page = make_page(out, save_dir)
    out.text(f"wrote {', '.join(str(save_dir / name) for name in ('bench.json', 'report.md', *page))}")
    out.result(found)
    crashed = f"{len(found['crashed'])} of {len(found['configurations'])} configurations crashed: " + ", ".join(
        found["crashed"]
    )
    if found["missed"]:
        every = [describe_miss(miss) for miss in found["missed"]] + ([crashed] if found["crashed"] else [])
        raise PromiseMissedError("limit missed: " + "; ".join(every))
    if found["crashed"]:
        raise InputError(crashed, hint=f"the errors are in the last table and in {save_dir / 'bench.json'}")


def make_page(out: Output, save_dir: Path) -> list[str]:
    """`report.html` of what is in the folder now, where the drawing library is installed. Its failure costs no figure.
    In the folder of `sedac run` the page is that run's last step."""
    from sedac_cli.errors import SedacError
    from sedac_cli.pipeline.steps import STATE

    if (save_dir / STATE).exists():
        return []
    try:
        from sedac_cli.report.make import ReportOptions, make_report

        made = make_report(save_dir, ReportOptions(redraw=True))
    except ImportError as error:
        out.note(f"no report.html ({error}): pip install 'sedac[report]', then sedac report {save_dir}")
        return []
    except SedacError as error:
        out.note(f"no report.html: {error.message}")
        return []
    for problem in made.problems:
        out.note(f"report.html: {problem}")
    return [made.file.name]


def named_experiments(
    gates: str | None, modes: str | None, draft_tokens: int | None, url: str | None, baseline_url: str | None
) -> list[dict[str, Any]]:
    """What --gates, --modes and --url ask for, in the form of a matrix."""
    from sedac_cli.bench.modes import find_mode

    if url is not None and (gates is not None or modes is not None):
        raise UsageError(
            "--url measures a server as it is: its gate is its own",
            hint="--baseline-url of a dense server beside it; a matrix can ask by request (extra_body)",
        )
    if baseline_url is not None:
        if url is None:
            raise UsageError("--baseline-url is compared with --url", hint="--url http://127.0.0.1:8000/v1")
        return [
            {"name": "dense", "mode": "dense", "base_url": baseline_url},
            {"name": "server", "gate": "of the server", "base_url": url},
        ]
    if url is not None:
        return [{"name": "server", "gate": "of the server"}]
    if gates is None and modes is None:
        if draft_tokens is not None:
            raise UsageError("--draft-tokens needs a lossless mode", hint="--modes lossless --gates always:14")
        return []
    found: list[dict[str, Any]] = [{"name": "dense", "mode": "dense"}]
    for name in (modes or "gated").split(","):
        mode = find_mode(name.strip())
        drafts = {"speculative_config": {"num_speculative_tokens": draft_tokens}} if draft_tokens and mode.draft else {}
        if mode.needs_gate and gates is None:
            raise UsageError(f"mode '{mode.name}' needs a gate", hint="--gates always:14")
        if mode.name == "dense":
            continue
        for gate in split_gates(str(gates)) if mode.needs_gate else [None]:
            label = mode.name if gate is None else gate if mode.name == "gated" else f"{mode.name} {gate}"
            found.append({"name": label, "mode": mode.name, **({"gate": gate} if gate else {}), **drafts})
    return found


@sedac_command()
def compare(
    out: Output,
    before: Annotated[Path, typer.Argument(help="bench.json, or its folder: the earlier run.")],
    after: Annotated[Path, typer.Argument(help="The later run.")],
    confidence: Annotated[float, typer.Option("--confidence", min=0.5, max=0.9999, help="Of each interval.")] = 0.99,
    min_change: Annotated[float, typer.Option("--min-change", min=0, help="Changes below this share do not count.")] = 0.02,
    fail_on_regression: Annotated[bool, typer.Option("--fail-on-regression", help="Exit code 1 if anything got worse.")] = False,
) -> None:  # fmt: skip
    """What changed between two runs of `sedac bench`, and whether it is more than noise."""
    from sedac_cli.bench.compare import compare_documents
    from sedac_cli.bench.document import RANDOM_WEIGHTS, read_document

    found = compare_documents(read_document(before), read_document(after), confidence=confidence, min_change=min_change)
    for difference in found.environment:
        out.note(f"not the same: {difference}")
    rows = [
        [c.configuration, c.where, c.figure, f"{c.before:.5g}", f"{c.after:.5g}", f"{c.ratio:.3f}x",
         "-" if c.low is None else f"{c.low:.3f} .. {c.high:.3f}", c.verdict]
        for c in found.changes
    ]  # fmt: skip
    out.table(
        f"{before} -> {after}" + (" (random weights)" if found.random_weights else ""),
        [
            "configuration",
            "work",
            "figure",
            "before",
            "after",
            "after / before",
            f"{confidence:.0%} interval",
            "verdict",
        ],
        rows,
        caption=f"better or worse: the interval leaves 1 out and the change is at least {min_change:.0%}; all else is noise. "
        "Absolute figures move with the machine; speed-ups are paired within each run."
        + (f" {RANDOM_WEIGHTS}" if found.random_weights else ""),
    )
    for line in found.only_in_one:
        out.note(line)
    out.result(found)
    worse = [c for c in found.changes if c.verdict == "worse"]
    if fail_on_regression and worse:
        raise PromiseMissedError(
            "worse than before: " + "; ".join(f"{c.configuration} {c.figure} {c.ratio:.3f}x ({c.where})" for c in worse)
        )


def _root(ctx: typer.Context, **values: Any) -> None:
    if ctx.invoked_subcommand is None:
        measure(**values)


_context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
_own = inspect.signature(measure)
_root.__signature__ = _own.replace(parameters=[_context, *_own.parameters.values()])  # type: ignore[attr-defined]
_root.__annotations__ = {"ctx": typer.Context} | measure.__annotations__
_root.__doc__ = measure.__doc__
app.callback()(_root)
app.command()(compare)
