"""`sedac calibrate`: thresholds for a share of tokens that exit, or the loosest setting whose harm is certified."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sedac_cli.commands._common import option, sedac_command
from sedac_cli.config import ModelSpec, TextSpec, parse_layers, parse_rates
from sedac_cli.console import Output
from sedac_cli.errors import PromiseMissedError, UsageError

if TYPE_CHECKING:
    from sedac_cli.artifacts.manifest import ModelIdentity
    from sedac_cli.pipeline.certify.run import CertifyOptions, CertifyReport

MODEL = ModelSpec(ref="")
TEXT = TextSpec(dataset="")
"""Nothing named: the model and the text of the data folder."""


@sedac_command(model=MODEL, text=TEXT)
def calibrate(
    out: Output,
    seed: int,
    model: ModelSpec,
    text: TextSpec,
    data_dir: Annotated[Path, typer.Option("--data-dir", help="Folder with collected states and probes.")] = Path(
        "sedac_data"
    ),
    layers: Annotated[str | None, typer.Option("--layers", help="Checkpoints to use; all if left out.")] = None,
    target_exit_rate: Annotated[
        str | None,
        typer.Option(
            "--target-exit-rate", help="Share that exits at each checkpoint, of those that reach it: 0.2,0.6,0.9."
        ),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option("--strategy", help="conservative, balanced (default) or aggressive: 10, 15, 25 % of tokens exit."),
    ] = None,
    batch_rule: Annotated[
        str, typer.Option("--batch-rule", help="token: each for itself; max: a step exits only as a whole.")
    ] = "token",
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Sequences per step, for rule max; per forward pass, to certify.")
    ] = 8,
    max_harm: Annotated[
        str | None,
        option("Certify", "--max-harm", help="Run settings until one exceeds: ppl=1.02, agreement=0.98, kl=0.05."),
    ] = None,
    min_agreement: Annotated[
        float | None, option("Certify", "--min-agreement", help="The same as --max-harm agreement=...")
    ] = None,
    confidence: Annotated[
        float | None, option("Certify", "--confidence", help="That the promise holds; default 0.95.")
    ] = None,
    bound: Annotated[
        str | None,
        option("Certify", "--bound", help="wsr (default): by betting, needs less text. hb: Hoeffding-Bentkus."),
    ] = None,
    gate: Annotated[
        str | None,
        option(
            "Certify",
            "--gate",
            help="cascade (default), fixed, soft, learned:FILE.pth, stability, entropy, always, random. Without a limit on "
            "harm: entropy[:threshold=0.5,...], whose mean and sd are then measured.",
        ),
    ] = None,
    allow_overlap: Annotated[
        bool, option("Certify", "--allow-overlap", help="Accept text that the probes were trained on.")
    ] = False,
    sinks: Annotated[int, option("Guards", "--sinks", min=0, help="First positions that never skip.")] = 4,
    protect_first: Annotated[int, option("Guards", "--protect-first", min=0, help="First layers that never skip.")] = 0,
    protect_last: Annotated[int, option("Guards", "--protect-last", min=0, help="Last layers that never skip.")] = 0,
    prefill: Annotated[bool, option("Guards", "--prefill/--no-prefill", help="Skip in the prompt too.")] = True,
    out_file: Annotated[
        Path | None, typer.Option("--out", help="Thresholds file; default thresholds.json in the data folder.")
    ] = None,
) -> None:
    """Choose thresholds for a share of tokens that exits, or, with --max-harm, the loosest setting that is certified.

    With --gate entropy alone: measure mean and sd of its lens entropy on the collected text, or on --dataset.

    To certify, settings are run on sequences the probes were not trained on: those that follow the collected ones in the
    same text, or --dataset.
    """
    if max_harm is not None or min_agreement is not None:
        if target_exit_rate or strategy:
            raise UsageError(
                "a limit on harm finds its own exit rates", hint="leave --target-exit-rate and --strategy out"
            )
        if batch_rule != "token":
            raise UsageError(
                f"--batch-rule {batch_rule}: sequences that decide together are no independent evidence",
                hint="--batch-rule token",
            )
        if max_harm is not None and min_agreement is not None:
            raise UsageError("--max-harm and --min-agreement: one promise per file", hint="leave one out")
        from sedac_cli.gates.base import Guards
        from sedac_cli.pipeline.certify.harm import Harm
        from sedac_cli.pipeline.certify.run import CertifyOptions

        harm = Harm.parse(max_harm) if max_harm is not None else Harm("agreement", float(min_agreement or 0))
        certify_it(
            out, model, text, data_dir,
            CertifyOptions(
                harm, gate or "cascade", 0.95 if confidence is None else confidence, bound or "wsr",
                tuple(parse_layers(layers)) if layers else None,
                Guards(sinks=sinks, first=protect_first, last=protect_last, prefill=prefill),
                batch_size, seed, allow_overlap, out_file,
            ),
        )  # fmt: skip
        return
    if gate is not None and gate.partition(":")[0].strip() == "entropy":
        others = {
            "--target-exit-rate": target_exit_rate, "--strategy": strategy, "--layers": layers,
            "--confidence": confidence, "--bound": bound,
        }  # fmt: skip
        for name, value in others.items():
            if value is not None:
                raise UsageError(
                    f"{name}: gate 'entropy' is measured, unless a limit on harm is given", hint="--max-harm ppl=1.05"
                )
        measure_it(
            out, model, text, data_dir, gate.partition(":")[2],
            (sinks, protect_first, protect_last, prefill), out_file, batch_size,
        )  # fmt: skip
        return
    certify_only = {
        "--confidence": confidence,
        "--bound": bound,
        "--gate": gate,
        "--allow-overlap": allow_overlap or None,
    }
    certify_only |= {"--model": None if model == MODEL else model, "--dataset": None if text_options(text) else text}  # type: ignore[dict-item]
    for name, value in certify_only.items():
        if value is not None:
            raise UsageError(f"{name} and its kind go with a limit on harm", hint="--max-harm agreement=0.98")
    if target_exit_rate and strategy:
        raise UsageError("--target-exit-rate and --strategy are two ways to say the same thing: give one")
    if batch_rule not in ("token", "max"):
        raise UsageError(f"--batch-rule: '{batch_rule}' is not known", hint="token or max")
    from sedac_cli.gates.base import Guards
    from sedac_cli.pipeline.calibrate import CalibrateOptions
    from sedac_cli.pipeline.calibrate import calibrate as run

    options = CalibrateOptions(
        layers=tuple(parse_layers(layers)) if layers else None,
        rates=tuple(parse_rates(target_exit_rate, "target-exit-rate")) if target_exit_rate else None,
        strategy=strategy,
        batch_rule=batch_rule,  # type: ignore[arg-type]
        batch_size=batch_size,
        guards=Guards(sinks=sinks, first=protect_first, last=protect_last, prefill=prefill),
        out=out_file,
    )
    report = run(data_dir, options)
    unit = report.label_unit
    out.table(
        f"{report.gate} thresholds on {report.tokens:,} tokens -> {report.file}",
        ["layer", "threshold", "target rate", "exit rate", "reached", f"label of exited ({unit})", f"of kept ({unit})"],
        [
            [c.layer, f"{c.threshold:.4f}", f"{c.target_rate:.1%}", f"{c.exit_rate:.1%}", f"{c.reached:,}",
             f"{c.exited_label:.3f}", f"{c.kept_label:.3f}"]
            for c in report.checkpoints
        ],
        caption=(
            f"{report.exited_share:.1%} of tokens exit, {report.mlp_skip_ratio:.1%} of MLPs skipped, on collected states. "
            "An exit rate promises nothing about quality: run `sedac validate`."
        ),
    )  # fmt: skip
    out.result(report)


def text_options(text: TextSpec) -> bool:
    """Whether the text options are as if none were given."""
    return replace(text, seed=0) == TEXT


def model_of(model: ModelSpec, known: ModelIdentity | None) -> ModelSpec:
    """The model named, or the one the data folder was made with."""
    if model.ref:
        return model
    revision = known.revision if known and model.revision is None else model.revision
    return replace(model, ref=known.ref if known else ModelSpec().ref, revision=revision)


def measure_it(
    out: Output, model: ModelSpec, text: TextSpec, data_dir: Path, argument: str,
    guards: tuple[int, int, int, bool], out_file: Path | None, batch_size: int,
) -> None:  # fmt: skip
    from sedac_cli.artifacts.manifest import MANIFEST
    from sedac_cli.gates.base import Guards
    from sedac_cli.models import load_model
    from sedac_cli.pipeline.data import CollectedData
    from sedac_cli.pipeline.lens import calibrate_entropy

    data = CollectedData.open(data_dir) if (data_dir / MANIFEST).exists() else None
    if data is None and not text.dataset:
        raise UsageError(f"no text: {data_dir} holds none, and none is named", hint="--dataset FILE, or sedac collect")
    source = text if text.dataset else data
    assert source is not None
    loaded = load_model(model_of(model, data.manifest.model if data else None))
    path = out_file or data_dir / "thresholds.json"
    report = calibrate_entropy(loaded, argument, source, Guards(*guards), path, data_dir, batch_size)
    out.table(
        f"lens entropy on {report.tokens:,} tokens -> {report.file}",
        ["checked layer", "mean (bits)", "sd (bits)"],
        [[row["layer"], f"{row['mean']:.4f}", f"{row['sd']:.4f}"] for row in report.layers],
        caption=f"Nothing is promised: sedac validate --gate entropy:{report.file}",
    )
    out.result(report)


def certify_it(out: Output, model: ModelSpec, text: TextSpec, data_dir: Path, options: CertifyOptions) -> None:
    from sedac_cli.artifacts.manifest import MANIFEST, Manifest
    from sedac_cli.models import load_model
    from sedac_cli.pipeline.certify.run import certify

    known = Manifest.read(data_dir).model if (data_dir / MANIFEST).exists() else None
    report = certify(load_model(model_of(model, known)), text, options, data_dir, out.progress())
    show(out, report)
    out.result(report)
    if report.chosen is None:
        raise PromiseMissedError(
            f"no setting of gate '{report.gate}' can be certified to keep {report.harm} with confidence "
            f"{report.confidence:g}: never skip ({report.file} holds a gate that never does)",
            hint="a looser limit, more text (--samples), or a gate with stand-ins (`sedac distill`)",
        )


def show(out: Output, report: CertifyReport) -> None:
    measures = ("skip_ratio", "loss", "value", "p", "clipped_above", "neighbour_correlation", "certified")
    rows = []
    for row in report.candidates:
        setting = ", ".join(
            f"{key} {value:g}" for key, value in row.items() if key not in measures and isinstance(value, int | float)
        )
        rows.append(
            [setting, f"{row['skip_ratio']:.2%}", f"{row['value']:.4f}", f"{row['p']:.3g}", row["clipped_above"],
             "certified" if row["certified"] else "not certified"]
        )  # fmt: skip
    out.table(
        f"gate {report.gate}: {report.harm} with confidence {report.confidence:g}, on {report.sequences} sequences",
        ["setting", "MLPs skipped", report.harm.rsplit(" ", 2)[0], "p-value", "clipped", ""],
        rows,
        caption=f"{len(rows)} of {report.rungs} settings tested, strict to loose, up to the first that fails. "
        f"Promised: {report.promise}. At least {report.needed} sequences are needed.",
    )
    if report.candidates and abs(report.candidates[-1]["neighbour_correlation"]) > 0.3:
        out.note(
            "note: neighbouring sequences do equally well or badly (correlation "
            f"{report.candidates[-1]['neighbour_correlation']:.2f}); the confidence assumes that sequences are independent"
        )
    out.text(f"wrote {report.file}")
