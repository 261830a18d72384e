"""A pipeline file as steps: which verbs it names, what each is told, and each run as the command line would run it.

steps = build_steps({"model": "builtin:tiny", "collect": {"samples": 60}}, folder, where="run.yaml", seed=0, quiet=False)
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sedac_cli.console import on_interrupt
from sedac_cli.errors import InputError, PromiseMissedError, UsageError, did_you_mean

if TYPE_CHECKING:
    from sedac_cli.pipeline.steps import Outcome, Step

ClickError: Any = typer.BadParameter.__mro__[2]
INTERRUPTED = 130

ORDER = ("collect", "train-probes", "distill", "calibrate", "validate", "bench", "report")
GATES_FILE, THRESHOLDS = "sedac_gates.pth", "thresholds.json"
OUTPUTS = {
    "collect": ("hidden_states_layer*.pt", "entropies_layer*.pt", "token_ids.pt", "sequence_ids.pt"),
    "train-probes": ("sedac_probe_layer*.pth",), "distill": (GATES_FILE,), "calibrate": (THRESHOLDS,),
    "validate": ("validate.json",), "bench": ("bench.json",), "report": ("report.html", "tokens.json"),
}  # fmt: skip
NEEDS = {
    "collect": (), "train-probes": ("collect",), "distill": (), "calibrate": ("collect", "train-probes", "distill"),
    "validate": ("collect", "train-probes", "distill", "calibrate"), "bench": ("train-probes", "distill", "calibrate"),
    "report": ("collect", "train-probes", "distill", "calibrate", "validate", "bench"),
}  # fmt: skip
FOLDER = {"collect": "save_dir", "train-probes": "data_dir", "distill": "save", "calibrate": "data_dir",
          "validate": "data_dir", "bench": "save_dir", "report": "run_dir"}  # fmt: skip
"""The option by which each verb is told the run's folder."""
NOT_HERE = ("resume", "overwrite", "config", "json", "quiet", "debug", "seed", "redraw", "out", "out_file")
"""Options that are the run's own business."""


def build_steps(config: dict[str, Any], folder: Path, where: str, seed: int, quiet: bool) -> list[Step]:
    """Sections in the order of the pipeline, each checked as its command would check it; the report is always last."""
    from sedac_cli.pipeline.steps import Step

    commands = _commands()
    sections = {str(k).replace("_", "-"): v for k, v in config.items() if str(k).replace("_", "-") in ORDER}
    shared = {str(k): v for k, v in config.items() if str(k).replace("_", "-") not in ORDER}
    for name, section in sections.items():
        if not isinstance(section, dict | None) and not (name == "report" and section is False):
            raise UsageError(f"{where}: {name}: expected options as 'name: value' lines, found {section!r}")
    chosen = [name for name in ORDER if name in sections or name == "report"]
    if sections.get("report") is False:
        chosen.remove("report")
    if not set(chosen) - {"report"}:
        raise UsageError(f"{where} names no step", hint="sections: " + ", ".join(ORDER))
    for name in chosen:
        if name not in commands:
            raise UsageError(f"{where}: there is no `sedac {name}` in this installation")
    tables = {name: _parameters(commands[name]) for name in chosen}
    _refuse_unknown(shared, tables, where)
    steps = []
    for name in chosen:
        own = {_key(k): v for k, v in (sections.get(name) or {}).items()}
        for key in own:
            if key in NOT_HERE or key == FOLDER[name] or key not in tables[name]:
                known = sorted(k.replace("_", "-") for k in tables[name] if k not in NOT_HERE and k != FOLDER[name])
                raise UsageError(
                    f"{where}: {name}: '{key}' is not an option here.{did_you_mean(key.replace('_', '-'), known)}",
                    hint="options: " + ", ".join(known),
                )
        takes = {_key(k): v for k, v in shared.items() if _key(k) in tables[name]}
        if name == "calibrate" and not {"max_harm", "min_agreement"} & own.keys():
            takes = {}  # by exit rates it reads what was collected, and neither model nor text
        told = takes | _defaults(name, own, sections, folder) | own
        argv = _argv(name, told, tables[name], folder, seed, where)
        _check(commands[name], name, argv, where)
        environment = {k: v for k, v in os.environ.items() if k.startswith(f"SEDAC_{name.upper().replace('-', '_')}_")}
        needs = tuple(n for n in NEEDS[name] if n in chosen)
        options = {"argv": argv, "environment": environment}
        steps.append(
            Step(name, options, needs, OUTPUTS[name], _sources(told, folder), _runner(name, argv, folder, quiet))
        )
    return steps


def _commands() -> dict[str, Any]:
    from sedac_cli.cli import app

    return typer.main.get_command(app).commands  # type: ignore[attr-defined]


def _key(name: object) -> str:
    return str(name).replace("-", "_")


def _parameters(command: Any) -> dict[str, Any]:
    """Every name a parameter goes by: the function's and the option's."""
    found = {}
    for parameter in command.params:
        for name in (parameter.name, *(opt[2:] for opt in parameter.opts if opt.startswith("--"))):
            found[_key(name)] = parameter
    return found


def _refuse_unknown(shared: dict[str, Any], tables: dict[str, dict[str, Any]], where: str) -> None:
    known = {key for table in tables.values() for key in table} - set(NOT_HERE) - set(FOLDER.values())
    for name in shared:
        if _key(name) not in known:
            names = sorted(k.replace("_", "-") for k in (*known, *ORDER))
            raise UsageError(
                f"{where}: '{name}' is neither a step nor an option of one.{did_you_mean(str(name), names)}",
                hint="steps: " + ", ".join(ORDER) + "; and save-dir, seed",
            )


def _defaults(name: str, own: dict[str, Any], sections: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What follows from the other steps: the gate that was just made is the one that is certified, checked and measured."""
    distilled = sections.get("distill", False) is not False and "distill" in sections
    kind = str((sections.get("distill") or {}).get("gate", "learned"))
    made = f"{kind}:{folder / GATES_FILE}"
    certifies = bool({"max_harm", "min_agreement"} & own.keys())
    if name == "calibrate" and distilled and certifies:
        return {"gate": made}
    if name == "validate" and "calibrate" not in sections and distilled and "thresholds" not in own:
        return {"gate": made}
    if name == "bench" and not {"gates", "matrix", "modes"} & own.keys():
        if "calibrate" in sections:
            return {"gates": "THRESHOLDS"}
        return {"gates": made} if distilled else {}
    return {}


def _argv(name: str, told: dict[str, Any], table: dict[str, Any], folder: Path, seed: int, where: str) -> list[str]:
    """As the command line would have it. Values are joined to their options: one may begin with a dash."""
    place = folder / GATES_FILE if name == "distill" else folder
    words: list[str] = []
    if name == "report":
        words.append(str(place))
    else:
        words.append(f"{_option(table[FOLDER[name]])}={place}")
    if "seed" in table:
        words.append(f"--seed={seed}")
    for key, value in told.items():
        parameter = table[key]
        if value is None:
            continue
        if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(x, dict | list) for x in value)):
            raise UsageError(f"{where}: {name}: {key}: expected a value or a list of values")
        if isinstance(value, bool) and parameter.is_flag:
            flags = parameter.opts if value else parameter.secondary_opts
            words += [flag for flag in flags if flag.startswith("--")][:1]
            continue
        values = value if isinstance(value, list) else [value]
        texts = [str(x).lower() if isinstance(x, bool) else str(x) for x in values]
        option = _option(parameter)
        words += [f"{option}={text}" for text in (texts if parameter.multiple else [",".join(texts)])]
    return words


def _option(parameter: Any) -> str:
    return next(opt for opt in parameter.opts if opt.startswith("--"))


def _check(command: Any, name: str, argv: list[str], where: str) -> None:
    """Refuse a value now that its command would refuse an hour later."""
    try:
        command.make_context(name, list(argv))
    except ClickError as error:
        raise UsageError(f"{where}: {name}: {error.format_message()}") from None


def _sources(told: dict[str, Any], folder: Path) -> tuple[Path, ...]:
    """The files behind the model, the text, gates of one's own and a benchmark's matrix, as far as they are on this machine.
    What lies in the run's folder is an earlier step's result, and known as that."""
    from sedac_cli.resources import data_dir

    found = []
    for key, place in (("model", "models"), ("dataset", "text"), ("matrix", "matrices")):
        value = str(told.get(key, ""))
        if value.startswith("builtin:"):
            name = value.removeprefix("builtin:") + (".json" if key == "matrix" else "")
            found.append(data_dir() / place if key == "dataset" else data_dir() / place / name)
        elif value:
            found.append(Path(value))
    found += [Path(str(told[key])) for key in ("prompts", "task_folder", "include_path") if key in told]
    for key in ("gate", "gates"):
        specs = told.get(key) or []
        for spec in specs if isinstance(specs, list) else str(specs).split(","):
            found.append(Path(str(spec).partition(":")[2].partition("@")[0] or "."))
    here = Path().resolve()
    outside = [path for path in found if not path.resolve().is_relative_to(folder.resolve()) and path.resolve() != here]
    return tuple(path for path in outside if path.exists())


def _runner(name: str, argv: list[str], folder: Path, quiet: bool) -> Any:
    def do(resume: bool) -> tuple[dict[str, Any], str | None]:
        words = [name, *(_placed(word, folder) for word in argv)]
        words += _again(name, folder, resume) + ["--json"] + (["--quiet"] if quiet else [])
        printed, missed = io.StringIO(), None
        from sedac_cli.cli import app

        try:
            with contextlib.redirect_stdout(printed):
                code = app(args=words, standalone_mode=False, prog_name="sedac")
        except PromiseMissedError as error:
            code, missed = 0, error.message
        finally:
            on_interrupt("the same command again; finished steps are kept")
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        if code:
            raise InputError(f"sedac {name} ended with {code}")
        return _kept(name, json.loads(printed.getvalue() or "{}")), missed

    return do


def _placed(word: str, folder: Path) -> str:
    """The gate that calibrate chose is known only when it has chosen."""
    if word != "--gates=THRESHOLDS":
        return word
    from sedac_cli.artifacts.thresholds import Thresholds

    path = folder / THRESHOLDS
    return f"--gates={Thresholds.read(path).gate}:{path}"


def _again(name: str, folder: Path, resume: bool) -> list[str]:
    """How a verb is told that it may go on with, or replace, what an earlier run of these steps left."""
    if name == "collect":
        half = (folder / ".partial" / "run.json").exists()
        return ["--resume"] if resume and half else ["--overwrite"]
    if name == "distill":
        return ["--resume"] if resume and (folder / GATES_FILE).with_suffix(".training.pt").exists() else []
    return []


def _kept(name: str, document: dict[str, Any]) -> dict[str, Any]:
    """What `run.json` keeps of a result: all of it, but of a benchmark, whose samples are in its own file, the headlines."""
    if name != "bench":
        return document
    rows = [{k: c.get(k) for k in ("name", "status", "summary")} for c in document.get("configurations", [])]
    return {"configurations": rows, "missed": document.get("missed"), "crashed": document.get("crashed")}


def sentence(outcome: Outcome) -> str:
    """What a step found, in a line."""
    r = outcome.result
    try:
        return _SENTENCES[outcome.name](r)
    except (KeyError, TypeError, IndexError, ValueError):
        return "done"


_SENTENCES: dict[str, Any] = {
    "collect": lambda r: f"{r['tokens']:,} tokens of {r['sequences']:,} samples",
    "train-probes": lambda r: "Spearman " + ", ".join(f"{x['probe']['spearman']:.3f} (layer {x['layer']})" for x in r["layers"]),
    "distill": lambda r: f"{r['steps']:,} steps, {r['tokens']:,} tokens, gate {r['gate']}",
    "calibrate": lambda r: (
        f"{r['exited_share']:.1%} of tokens exit, on the calibration text" if "exited_share" in r
        else f"{r['harm']} with confidence {r['confidence']:g}: " + ("certified" if r["chosen"] else "never skip")
    ),
    "validate": lambda r: (
        f"{r['reality']['mlp_skip_ratio']:.2%} of MLPs skipped, ppl ratio {r['measures']['ppl_ratio']:.4f}, "
        f"agreement {r['measures']['agreement']:.4f}"
    ),
    "bench": lambda r: ", ".join(
        f"{c['name']}: {c['summary']['speedup']:.3f}x" if (c.get("summary") or {}).get("speedup") else f"{c['name']}: {c['status']}"
        for c in r["configurations"]
    ),
    "report": lambda r: f"{r['file']} (promise: {r['verdict']})",
}  # fmt: skip
