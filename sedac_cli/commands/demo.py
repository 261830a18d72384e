"""`sedac demo`: the whole pipeline on the built-in model and text."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from sedac_cli.commands._common import sedac_command
from sedac_cli.commands._pipeline import build_steps
from sedac_cli.commands.report import report_needs
from sedac_cli.console import Output, on_interrupt


@sedac_command()
def demo(
    out: Output,
    seed: int,
    save_dir: Annotated[Path, typer.Option("--save-dir", help="Folder for everything it writes.")] = Path("sedac_demo"),
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda.")] = "auto",
) -> None:
    """Run collect, train-probes, calibrate, validate and report on what comes with sedac; no network, a minute or two."""
    from sedac_cli.pipeline.demo import demo_config
    from sedac_cli.pipeline.steps import run_steps

    began = time.monotonic()
    config = demo_config(device)
    lacks = report_needs()
    if lacks:
        config["report"] = False
        out.note(f"no report.html: it needs {lacks} (pip install 'sedac[report]')")
    steps = build_steps(config, save_dir, "the demo", seed, out.quiet)
    on_interrupt("the same command again; finished steps are kept")
    done = {outcome.name: outcome.result for outcome in run_steps(save_dir, steps, "demo", say=out.note)}
    seconds = time.monotonic() - began
    collected, trained = done["collect"], done["train-probes"]
    calibrated, validated = done["calibrate"], done["validate"]
    measures, spans, reality = validated["measures"], validated["intervals"], validated["reality"]
    rows = [
        ["collect", f"{collected['tokens']:,} tokens", f"{collected['tokens_per_second']:,.0f} tokens/s"],
        *(
            [f"train-probes, layer {x['layer']}", f"Spearman {x['probe']['spearman']:.3f}",
             f"linear baseline {x['linear']['spearman']:.3f}"]
            for x in trained["layers"]
        ),
        ["calibrate", f"{calibrated['exited_share']:.1%} of tokens exit", "on the calibration text"],
        ["validate: MLPs skipped", f"{reality['mlp_skip_ratio']:.2%}", f"{reality['compute_saved']:.2%} of the model's FLOPs"],
        ["validate: ppl ratio", f"{measures['ppl_ratio']:.4f}", "{:.4f} .. {:.4f}".format(*spans["ppl_ratio"])],
        ["validate: agreement", f"{measures['agreement']:.4f}", "{:.4f} .. {:.4f}".format(*spans["agreement"])],
    ]  # fmt: skip
    out.table(
        f"sedac on builtin:tiny, {seconds:.0f} s",
        ["step", "result", "95 % interval or note"],
        rows,
        caption="Every token runs an MLP in each of 28 layers. Probes that guess what skipping would cost (Spearman: how "
        "well, 1 is perfect) chose which to leave out. ppl ratio: perplexity against the whole model, on books the gate has not "
        "seen; 1 is no loss. agreement: how often the likeliest next word stays the same. With nothing in a skipped MLP's "
        "place it costs this much; a trained stand-in there costs far less (sedac distill).",
    )
    gate = f"cascade:{save_dir / 'thresholds.json'}"
    told = [
        ("read", f"{save_dir / 'report.html'}, in a browser: every token of a text by what it skipped"),
        ("try", f'sedac generate --gate {gate} --show exits --temperature 0.8 --prompt "She looked at him and said"'),
        ("talk", f"sedac chat --gate {gate}"),
        ("next", "sedac collect --help; the same steps on your model and text"),
    ]
    for word, what in told[bool(lacks) :]:
        out.text(f"  {word:5} {what}")
    out.result(
        {"folder": save_dir, "collected": collected, "trained": trained, "calibrated": calibrated, "validated": validated,
         "report": done.get("report"), "seconds": seconds}
    )  # fmt: skip
