"""`sedac patch`: turn the plugin on in the vLLM of an interpreter, prove that it is live, look, and turn it off again."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from sedac_cli.commands._common import option, sedac_command
from sedac_cli.console import Output
from sedac_cli.errors import UsageError


@sedac_command()
def patch(
    out: Output,
    python: Annotated[str, typer.Option("--python", help="The interpreter that runs vLLM; default: this one.")] = "",
    gate: Annotated[
        str | None,
        typer.Option(
            "--gate", help="always:20, cascade:thresholds.json, learned:FILE.pth@0.25; default: the probe cascade."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="NAME=VALUE, the names of the SEDAC_ variables: probe_dir=..., sinks=4. Repeatable."
        ),
    ] = None,
    prove: Annotated[
        bool,
        typer.Option("--prove/--no-prove", help="Run a tiny model under that vLLM and see its MLPs being skipped."),
    ] = True,
    dry_run: Annotated[bool, option("Instead", "--dry-run", help="Say what would be done, and do nothing.")] = False,
    status: Annotated[bool, option("Instead", "--status", help="Say what is in force.")] = False,
    revert: Annotated[bool, option("Instead", "--revert", help="Turn it off; take the source patch out.")] = False,
    target: Annotated[
        Path | None,
        option(
            "Source patch",
            "--target",
            help="A vLLM source tree in which plugins are not seen, or its plugins/__init__.py.",
        ),
    ] = None,
) -> None:
    """Turn SEDAC on in an installed vLLM and prove it live. No file of vLLM's is touched, unless --target names one."""
    if sum((dry_run, status, revert)) > 1:
        raise UsageError("--dry-run, --status and --revert exclude each other")
    if target is not None and (gate is not None or settings):
        raise UsageError(
            "--target only makes vLLM load the plugin; --gate and --set belong to the environment",
            hint="SEDAC_ENABLED=1 SEDAC_GATE=... vllm serve ..., or sedac patch --gate ...",
        )
    action = "dry-run" if dry_run else "status" if status else "revert" if revert else "patch"
    if target is not None:
        patch_source(out, action, target, python, prove)
    else:
        patch_environment(out, action, python or sys.executable, gate, settings or [], prove)


def patch_environment(
    out: Output, action: str, python: str, gate: str | None, pairs: list[str], prove: bool
) -> None:  # fmt: skip
    from sedac_cli.vllm import patch_site as sites
    from sedac_cli.vllm.switch import environment_place, user_place

    site = sites.find_site(python)
    if action == "status":
        show(out, sites.state_of(site))
        return
    with sites.locked(site.prefix):
        if action == "revert":
            gone = sites.turn_off(site)
            for path in gone:
                out.note(f"deleted {path}")
            out.note("vLLM runs without sedac there now" if gone else "nothing to turn off")
            out.result(sites.state_of(site) | {"deleted": [str(path) for path in gone]})
            return
        site.require_plugin()
        values = sites.given_settings(pairs, gate)
        sites.require_artifacts(values)
        own = environment_place(site.prefix)
        path = own if sites.can_write(own) else user_place(site.prefix)
        if action == "dry-run":
            out.text(f"vLLM {site.vllm} at {site.package}, sedac {site.sedac}, Python {site.python}")
            out.text(f"would write {path}: {', '.join(f'{k}={v}' for k, v in values.items())}")
            out.text("would run a tiny random model under it and count its skips" if prove else "would not prove it")
            out.result(sites.state_of(site) | {"would_write": str(path), "would_set": values, "would_prove": prove})
            return
        if path != own:
            out.note(f"{own.parent} cannot be written: the settings go to {path} and hold for this user only")
        proof: Any = None
        with sites.kept_on_failure(site):
            sites.turn_on(site, values, proved=False)
            if prove:
                from sedac_cli.vllm.patch_proof import prove as run_proof

                out.note(f"running a tiny random model under vLLM {site.vllm}")
                proof = run_proof(site.interpreter, {})  # what turns it on there is the file alone
                sites.turn_on(site, values, proved=True)
    report = sites.state_of(site)
    show(out, report, proof)


def patch_source(out: Output, action: str, path: Path, python: str, prove: bool) -> None:
    from sedac_cli.vllm import patch_source as source
    from sedac_cli.vllm.patch_site import find_site, locked

    target = source.find_target(path)
    found: Any = None
    with ExitStack() as stack:
        if action in ("patch", "revert"):
            stack.enter_context(locked(target.file.parent))
        if action == "patch":
            site = find_site(python) if python else None
            if site is not None and site.package.resolve() != target.file.parent.parent:
                raise UsageError(f"--python {python} imports vllm from {site.package}, --target is {target.file}")
            changed = source.patch(target)
            out.note(f"patched {target.file}; the original is {target.backup.name}" if changed else "patched already")
            if prove and site is not None:
                from sedac_cli.vllm.patch_proof import prove as run_proof

                out.note(f"running a tiny random model under vLLM {site.vllm}, entry points off")
                try:
                    found = run_proof(site.interpreter, {"SEDAC_ENABLED": "1", "VLLM_PLUGINS": ""})
                except BaseException:
                    if changed:
                        source.revert(target)
                        out.note("taken out again")
                    raise
            elif prove:
                out.note("not proved: --python names the interpreter that runs this tree")
        elif action == "revert":
            out.note(f"{target.file} is as vLLM has it" if source.revert(target) else "nothing to take out")
        state = source.state_of(target)
    word = state.word
    out.table(
        "Source patch", ("file", "vLLM", "state", "known as"),
        [(target.file, target.version or "?", word + (f" by {state.by}" if state.by else ""), state.known_as or "no version")],
    )  # fmt: skip
    if state.difference:
        out.text(state.difference)
    if action == "dry-run":
        out.text(
            "would put the lines that load the plugin behind `plugins_loaded = True`" if word == "original" else
            "would do nothing" if word == "patched" else "would refuse"
        )  # fmt: skip
    if state.stale_backup:
        out.note(f"{target.backup} is of another file: vLLM was exchanged after it had been patched")
    show_proof(out, found)
    out.result(
        {
            "file": target.file, "vllm": target.version, "state": word, "known_as": state.known_as, "by": state.by,
            "difference": state.difference, "stale_backup": state.stale_backup, "proof": found,
        }
    )  # fmt: skip


def show(out: Output, report: dict[str, Any], proof: Any = None) -> None:
    rows = [
        ("state", report["state"] + (f": {report['why']}" if "why" in report else "")),
        ("vLLM", f"{report['vllm']} at {report['package']}"),
        ("sedac there", f"{report['sedac']}, {'seen' if report['entry_point'] else 'not seen'} by vLLM as a plugin"),
        ("Python", f"{report['python']}, {report['interpreter']}"),
    ]
    if report["file"]:
        rows.append(("settings", ", ".join(f"{k}={v}" for k, v in report["settings"].items()) or "defaults"))
        rows.append(("file", report["file"]))
        rows.append(("proved", "yes" if report["proved"] else "no"))
    out.table("SEDAC in vLLM", ("what", "found"), rows)
    show_proof(out, proof)
    out.result(report | {"proof": proof})


def show_proof(out: Output, proof: Any) -> None:
    if proof is None:
        return
    out.text(
        f"proved on {proof.device} ({proof.runner} runner, {proof.how}): {proof.workers} worker, {proof.processes} processes with "
        f"the plugin; a random model's MLPs skipped by layer {proof.skipped} of {proof.tokens} tokens each; "
        f"log-probabilities move by up to {proof.change:.2g}"
    )
