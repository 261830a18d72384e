"""`sedac validate`: what a gate really does to quality and work, on other text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sedac_cli.commands._common import option, sedac_command
from sedac_cli.commands._online import Adaptive, CalibrationSteps, DeepRounds, DeepThreshold, read_online, show_adaptive
from sedac_cli.config import ModelSpec, TextSpec
from sedac_cli.console import Output
from sedac_cli.errors import InputError, PromiseMissedError, UsageError

if TYPE_CHECKING:
    from sedac_cli.pipeline.certify.check import PromiseCheck
    from sedac_cli.pipeline.validate import ValidateReport


@sedac_command(model=ModelSpec(), text=TextSpec(split="validation", samples=100))
def validate(
    out: Output,
    seed: int,
    model: ModelSpec,
    text: TextSpec,
    data_dir: Annotated[Path, typer.Option("--data-dir", help="Folder with collected states and probes.")] = Path(
        "sedac_data"
    ),
    thresholds: Annotated[
        Path | None, typer.Option("--thresholds", help="Thresholds file; default thresholds.json in the data folder.")
    ] = None,
    gate: Annotated[
        str | None, typer.Option("--gate", help="Another gate instead: never, always:14, random:0.3, cascade:FILE.")
    ] = None,
    batch_size: Annotated[int, option("Text", "--batch-size", min=1, help="Samples per forward pass.")] = 8,
    allow_overlap: Annotated[
        bool, option("Text", "--allow-overlap", help="Accept text that was calibrated on.")
    ] = False,
    max_ppl_ratio: Annotated[float | None, typer.Option("--max-ppl-ratio", min=0, help="Fail above this.")] = None,
    min_agreement: Annotated[
        float | None, typer.Option("--min-agreement", min=0, max=1, help="Fail below this.")
    ] = None,
    adaptive: Adaptive = None,
    calibration_steps: CalibrationSteps = None,
    deep_threshold: DeepThreshold = None,
    deep_rounds: DeepRounds = None,
    out_file: Annotated[
        Path | None, typer.Option("--out", help="Results with raw samples; default validate.json in the data folder.")
    ] = None,
) -> None:
    """Run the model dense and gated on text it was not calibrated on; compare simulation with reality."""
    from sedac_cli.artifacts.files import make_folder
    from sedac_cli.artifacts.manifest import MANIFEST
    from sedac_cli.artifacts.thresholds import Thresholds
    from sedac_cli.models import load_model
    from sedac_cli.pipeline.certify.check import check_promise, refuse_calibrated
    from sedac_cli.pipeline.data import CollectedData
    from sedac_cli.pipeline.validate import ValidateOptions, write_validation
    from sedac_cli.pipeline.validate import validate as run
    from sedac_cli.runtime.plan import check_spec, make_plan, plan_from_thresholds

    if gate is not None and thresholds is not None:
        raise UsageError("--gate and --thresholds each name a gate: give one", hint=f"--gate cascade:{thresholds}")
    path = thresholds or data_dir / "thresholds.json"
    online = read_online(adaptive, calibration_steps, deep_threshold, deep_rounds)
    deep = online.deep
    if gate is None and not path.is_file():
        raise InputError(f"no such file: {path}", hint="sedac calibrate makes it; or name a gate with --gate always:14")
    if gate is not None:
        check_spec(gate)
    if gate is not None and gate.endswith(".json"):
        path = Path(gate.partition(":")[2])
    chosen = Thresholds.read(path) if gate is None or gate.endswith(".json") else None
    data = CollectedData.open(data_dir) if (data_dir / MANIFEST).exists() else None
    loaded = load_model(model)
    if chosen is not None:
        chosen.model.require_same(loaded.identity, str(path))
        if not allow_overlap:
            refuse_calibrated(chosen, text, loaded.tokenizer, str(path))
    if chosen is not None and gate is None:
        plan = plan_from_thresholds(chosen, path.parent, loaded.decoder, loaded.identity)
    else:
        plan = make_plan(str(gate), loaded.decoder, loaded.identity, seed=seed)
    online.adapt(plan)
    options = ValidateOptions(batch_size, seed, allow_overlap, deep)
    report, evaluation = run(loaded, plan.gate, text, options, data, plan.standin, out.progress())
    target = out_file or data_dir / "validate.json"
    make_folder(target.parent)
    sums = evaluation.per_sequence()
    as_promised = chosen is not None and adaptive is None and deep is None
    check = (
        None if chosen is None or not as_promised else check_promise(chosen.promise, sums, packed=text.pack, seed=seed)
    )
    document = write_validation(target, report, evaluation, check)
    show(out, report, target)
    if chosen is not None and chosen.promise.kind == "certified" and not as_promised:
        out.note(
            "the promise of the thresholds file is not checked: with --adaptive or --deep-threshold it is another gate"
        )
    if check is not None:
        show_promise(out, check)
    out.result(document)
    missed = []
    if check is not None and not check.kept:
        missed.append(f"promised {check.harm}, measured {check.measured:.4f} on {check.sequences} sequences")
    # Negated, so that a model that gives NaN misses its limits.
    if max_ppl_ratio is not None and not report.measures["ppl_ratio"] <= max_ppl_ratio:
        missed.append(f"ppl ratio {report.measures['ppl_ratio']:.4f} > {max_ppl_ratio}")
    if min_agreement is not None and not report.measures["agreement"] >= min_agreement:
        missed.append(f"agreement {report.measures['agreement']:.4f} < {min_agreement}")
    if missed:
        raise PromiseMissedError("limit missed: " + "; ".join(missed), hint="a stricter gate: `sedac calibrate`")


def show(out: Output, report: ValidateReport, path: Path) -> None:
    ways = [("collected", report.simulation_collected), ("simulated", report.simulation), ("real", report.reality)]
    ways = [(name, way) for name, way in ways if way is not None]
    thresholds = dict(
        zip(report.parameters.get("checkpoints", []), report.parameters.get("thresholds", []), strict=False)
    )
    layers = sorted(thresholds) or [
        layer for layer in range(len(report.reality.skip_rates)) if any(way.exit_rates[layer] for _, way in ways if way)
    ]
    rows = []
    for layer in layers[:40]:
        limit = f"{thresholds[layer]:.4f}" if layer in thresholds else "-"
        entropy = report.reality.exited_entropy[layer]
        rows.append(
            [layer, limit, *(f"{way.exit_rates[layer]:.1%}" for _, way in ways if way), *(
                f"{way.skip_rates[layer]:.1%}" for _, way in ways if way),
             "-" if entropy is None else f"{entropy:.3f}"]
        )  # fmt: skip
    names = [name for name, _ in ways]
    out.table(
        f"gate {report.gate}: decisions per layer",
        [
            "layer",
            "threshold",
            *(f"exits, {n}" for n in names),
            *(f"MLPs skipped, {n}" for n in names),
            "bits of exited",
        ],
        rows,
        caption="exits: of the tokens that reach the layer. collected: on the calibration states; simulated: on this "
        "text's dense states; real: this text with the skips in force.",
    )
    lines = [
        ("MLP skip ratio", "mlp_skip_ratio", "{:.2%}"),
        ("average exit layer", "average_exit_layer", "{:.2f}"),
        ("compute saved, whole model", "compute_saved", "{:.2%}"),
        ("theoretical speed-up (FLOPs)", "theoretical_speedup", "{:.3f}x"),
    ]
    out.table(
        "simulation and reality",
        ["", *names, "real - simulated"],
        [
            [label, *(form.format(getattr(way, key)) for _, way in ways if way), _gap(report, key, form)]
            for label, key, form in lines
        ],
    )
    labels = [
        ("perplexity, dense", "ppl_dense", "{:.3f}"), ("perplexity, gated", "ppl_gated", "{:.3f}"),
        ("ppl ratio", "ppl_ratio", "{:.4f}"), ("agreement", "agreement", "{:.4f}"),
        ("KL(dense || gated), nats", "kl", "{:.4f}"), ("MLP skip ratio", "skip_ratio", "{:.4f}"),
    ]  # fmt: skip
    out.table(
        f"quality with the skips in force: {report.predicted_tokens:,} predicted tokens, {report.sequences} sequences",
        ["", "measured", "95 % interval"],
        [
            [label, form.format(report.measures[key]), " .. ".join(form.format(x) for x in report.intervals[key])]
            for label, key, form in labels
        ],
        caption="intervals: bootstrap over sequences",
    )
    for title, bins in report.bins.items():
        out.table(
            f"by {title}",
            ["bin", "tokens", "skip ratio", "ppl ratio", "agreement", "KL (nats)"],
            [
                [b["bin"], f"{b['tokens']:,}", f"{b['skip_ratio']:.2%}", f"{b['ppl_ratio']:.4f}",
                 f"{b['agreement']:.4f}", f"{b['kl']:.4f}"]
                for b in bins
            ],
        )  # fmt: skip
    show_adaptive(out, report.adaptive)
    if report.deep is not None:
        out.text(
            f"deep thinking above {report.deep['tau_high']:g} bits: {report.deep['tokens']:,} tokens run again, "
            f"{report.deep['passes']:.3f} passes per token (paid in every figure of what is skipped and saved)"
        )
    out.text(f"wrote {path}")


def show_promise(out: Output, check: PromiseCheck) -> None:
    out.table(
        f"the promise: {check.harm} with confidence {check.confidence:g}",
        ["promised", "on the calibration text", "measured here", "95 % interval", "clipped", ""],
        [
            [f"{check.limit:g}", "-" if check.calibrated is None else f"{check.calibrated:.4f}", f"{check.measured:.4f}",
             " .. ".join(f"{x:.4f}" for x in check.interval), check.clipped_above, "kept" if check.kept else "BROKEN"]
        ],
        caption=f"{check.promise}. clipped: sequences of {check.sequences} whose harm is larger than what was counted.",
    )  # fmt: skip


def _gap(report: ValidateReport, key: str, form: str) -> str:
    gap = getattr(report.reality, key) - getattr(report.simulation, key)
    return form.replace("{:", "{:+").format(gap)
