"""The part of the page that says how to make it again: commands, versions, settings, digests.

provenance(run, page); page["commands"]      # ["sedac demo"]
"""

from __future__ import annotations

import shlex
from typing import Any

from sedac_cli.report.sources import RunData
from sedac_cli.report.table import Table

TEXT_OPTIONS = {"dataset": "--dataset", "split": "--split", "samples": "--samples", "max_length": "--max-length"}


def provenance(run: RunData, page: dict[str, Any]) -> None:
    commands = [f"sedac {line}" for line in run.steps]
    made_by = [] if run.manifest is None else [shlex.join(s.command) for s in run.manifest.steps.values()]
    if not run.steps:
        commands += list(dict.fromkeys(made_by))
        if run.validation is not None:
            commands.append(_validate_command(run, run.validation["report"]))
        if run.bench is not None and run.bench.get("command"):
            commands.append(shlex.join(map(str, run.bench["command"])))
    elif made_by:
        page["whole"] = made_by[0]
    commands.append(shlex.join(["sedac", "report", str(run.folder)]))
    page["commands"] = commands
    page["settings"] = _settings(run)
    if run.manifest is not None:
        files = [(name, digest) for step in run.manifest.steps.values() for name, digest in step.files.items()]
        page["tables"]["files"] = Table(["file", "sha256"], [[name, digest[:16]] for name, digest in files])
    for document in (run.validation, run.bench):
        page["versions"] = page.get("versions") or (document or {}).get("versions") or {}
    if not page["versions"] and run.manifest is not None:
        page["versions"] = next((s.versions for s in run.manifest.steps.values()), {})


def _validate_command(run: RunData, report: dict[str, Any]) -> str:
    told = ["sedac", "validate", "--model", report["model"]["ref"], "--data-dir", str(run.folder)]
    text = report.get("text") or {}
    for name, option in TEXT_OPTIONS.items():
        if text.get(name) is not None:
            told += [option, str(text[name])]
    return shlex.join(told)


def _settings(run: RunData) -> list[str]:
    """What a command line does not say by itself."""
    model = (
        (run.validation or {}).get("report", {}).get("model") or (run.bench or {}).get("subject", {}).get("model") or {}
    )
    if isinstance(model, str):  # of a server, or of vLLM, the name is all that is known
        model = {"ref": model}
    found = []
    if model.get("ref"):
        found.append(f"model {model['ref']}" + (f" at {model['revision']}" if model.get("revision") else ""))
    if model.get("dtype"):
        found.append(str(model["dtype"]))
    if model.get("config_digest"):
        found.append(f"its config.json sha256 {model['config_digest'][:16]}")
    text = (run.validation or {}).get("report", {}).get("text") or {}
    if text.get("dataset"):
        found.append(f"validated on {text['dataset']}" + (f" ({text['split']})" if text.get("split") else ""))
    return found
