"""`sedac report` as the command runs it: read the folder, run the model over a text where that is wanted, write the page.

made = make_report(Path("sedac_data"), ReportOptions())
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sedac_cli.artifacts.files import make_folder, write_json
from sedac_cli.config import ModelSpec, TextSpec
from sedac_cli.errors import InputError, SedacError
from sedac_cli.report.render import write_report
from sedac_cli.report.sources import REPORT, TOKENS, RunData, gate_sources, read_run


@dataclass(frozen=True)
class ReportOptions:
    """What is None comes from the folder. `redraw`: make the page of what is there, without running a model."""

    model: ModelSpec | None = None
    gate: str | None = None
    text: str | None = None
    tokens: int = 400
    redraw: bool = False
    out: Path | None = None
    seed: int = 0


@dataclass(frozen=True)
class Made:
    file: Path
    verdict: str
    tokens: str
    """Where the heat map comes from: new, kept, or why there is none."""
    missing: list[tuple[str, str]]
    problems: list[str]


def make_report(folder: Path, options: ReportOptions) -> Made:
    from sedac_cli.report.verdict import verdict

    run = read_run(folder)
    told = tokens_of(run, options)
    path = options.out or folder / REPORT
    make_folder(path.parent)
    problems = write_report(run, path)
    return Made(path, verdict(run).status, told, run.missing, problems)


def tokens_of(run: RunData, options: ReportOptions) -> str:
    """Bring `run.tokens` up to date; says what was done. What was asked for by name fails rather than being left out."""
    named = options.model is not None or options.gate is not None or options.text is not None
    if options.redraw:
        return "kept" if run.tokens else "none: --redraw does not run the model"
    gate = options.gate or run.gate_spec
    sources = {} if options.gate else gate_sources(run)
    if not named and run.tokens is not None and (gate is None or run.tokens.get("source") == sources):
        return "kept"
    if gate is None and run.validation is not None:
        gate = _rebuilt(run.validation["report"])
    if gate is None:
        if named:
            raise InputError(f"{run.folder} names no gate to show", hint="--gate always:14")
        return "none: no gate in this folder"
    try:
        run.tokens = _read(run, options, gate, sources)
    except SedacError as error:
        if named:
            raise
        run.problems.append(f"the text could not be shown token by token: {error.message}")
        run.tokens = None
        return f"none: {error.message}"
    write_json(run.folder / TOKENS, run.tokens)
    return "new"


def _rebuilt(report: dict[str, Any]) -> str | None:
    """The spec of a gate that is told by its name and one number."""
    told = report.get("parameters") or {}
    simple = {"never": "never", "always": f"always:{told.get('layer')}", "random": f"random:{told.get('probability')}"}
    return simple.get(str(report.get("gate")))


def _read(run: RunData, options: ReportOptions, gate: str, sources: dict[str, str]) -> dict[str, Any]:
    from sedac_cli.models import load_model
    from sedac_cli.report.tokens import read_tokens
    from sedac_cli.runtime.plan import check_spec, make_plan

    check_spec(gate)
    spec = options.model or ModelSpec(ref=run.model_ref or "", revision=_revision(run))
    if not spec.ref:
        raise InputError("the files name no model", hint=f"sedac report {run.folder} --model MODEL")
    loaded = load_model(spec)
    plan = make_plan(gate, loaded.decoder, loaded.identity, seed=options.seed)
    ids, text = sample_text(run, options, loaded.tokenizer)
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    return read_tokens(loaded, plan, gate, ids[:limit], text, sources)


def _revision(run: RunData) -> str | None:
    return run.manifest.model.revision if run.manifest is not None else None


def sample_text(run: RunData, options: ReportOptions, tokenizer: Any) -> tuple[list[int], dict[str, Any]]:
    """Token ids, and where they are from: --text (a file, or the words themselves), the text the gate was validated on,
    or that it was made from."""
    from sedac_cli.corpus import Corpus

    if options.text is not None:
        path = Path(options.text)
        words, where = options.text, "the text given"
        try:
            if path.is_file():
                words, where = path.read_text(encoding="utf-8-sig"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {path}: {error}") from None
        ids = tokenizer(words, verbose=False)["input_ids"][: options.tokens]
        if len(ids) < 2:
            raise InputError(f"{where} has {len(ids)} tokens; at least 2 are needed", hint="--text FILE")
        return ids, {"file": where}
    spec = TextSpec(**_text_settings(run))
    spec = replace(spec, samples=1, max_length=max(2, options.tokens), seed=options.seed)
    return next(Corpus(spec, tokenizer).samples()), asdict(spec)


def _text_settings(run: RunData) -> dict[str, Any]:
    names = TextSpec.__dataclass_fields__
    if run.validation is not None and isinstance(run.validation["report"].get("text"), dict):
        return {k: v for k, v in run.validation["report"]["text"].items() if k in names}
    if run.manifest is not None and "collect" in run.manifest.steps:
        text = run.manifest.steps["collect"].settings.get("text") or {}
        return {k: v for k, v in text.items() if k in names}
    return {"dataset": "builtin:books", "split": "validation"}
