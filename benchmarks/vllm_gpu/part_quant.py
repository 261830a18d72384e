"""Quantized MLPs: a small random model whose linear layers are all rounded, by each method of --quantization.

gptq, awq      int4 checkpoints made here; gptq:32 has a scale for 32 weights each, a bare name for 128, which decides what kernel
               vLLM takes on Hopper: Machete for 64 and 128, Marlin for 32
int8           a compressed-tensors checkpoint made here, weights and inputs
fp8            weights and inputs, by vLLM while it loads
bitsandbytes   NF4 weights, by vLLM while it loads; needs the package of that name
none           not quantized: how far bfloat16 alone is from the reference

Everything on must be, to the bit, vLLM with the kernels that a gated MLP uses. Layers that are off must be counted, exactly those,
for every token. Both are compared with the Hugging Face runtime, in float32 on the rounded weights: the log-probabilities that it
gives to the very tokens that vLLM has read and chosen. `linears` says which classes the MLPs' layers had in the worker.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compare import NEW, compare, on_and_off, runs, same_kernels
from lab import FailedError, Lab, Spec, TooLateError
from part_equal import PROMPTS, difference, reference, small, small_engine

ON_LOADING = ("fp8", "bitsandbytes")
ASK = {"new": NEW, "prompts": PROMPTS}
TO_COMPARE = 60
"""Seconds kept for Hugging Face, which is asked at the end about whatever came so far."""


def run(lab: Lab) -> None:
    methods = [f"{name}:128" if name in ("gptq", "awq") else name for name in lab.args.quantization.split(",")]
    folder, _ = small(lab, "qwen2")
    asked = {"model": str(folder), "folder": str(lab.work / "rounded"), "methods": methods}
    made = reference(lab, "quantize", 240, do="quantize", **asked)
    specs = {}
    for method in methods:
        if "error" in made[method]:
            lab.problem(f"quant, {method}: {made[method]['error']}")
        else:
            specs[method] = pair(lab, method, Path(made[method]["packed"]))
    if not lab.args.alone:
        lab.start_once([spec for both in specs.values() for spec in both])
    got: dict[str, Any] = {}
    for method, both in specs.items():
        try:
            got[method] = one_method(lab, method, *both)
        except (FailedError, TooLateError) as error:
            lab.problem(f"quant, {method}: {error}")
            if lab.left() < TO_COMPARE:
                break
    lab.stop_all()
    wanted: dict[str, Any] = {}
    for method, outputs in got.items():
        wanted |= runs(method, made[method]["rounded"], outputs, PROMPTS, inputs=method)
    scored = reference(lab, "score-quant", 240, do="score", runs=wanted)
    for method, outputs in got.items():
        compare(lab, scored, method, outputs, method=method)
    if lab.args.quant_speed:
        from part_steps import measure

        large = [lab.plain("large-fp8-plain", quantization="fp8")]
        large += [lab.forced("nodes", "large-fp8-nodes", quantization="fp8", **same_kernels())]
        measure(lab, large, [1, 8], max(2, lab.args.rounds // 2))


def pair(lab: Lab, method: str, folder: Path) -> tuple[Spec, Spec]:
    """(plain, gated)."""
    more = small_engine(lab, folder) | same_kernels()
    if method in ON_LOADING:
        more["quantization"] = method
    return lab.plain(f"{method}-silu", **more), lab.forced("nodes", f"{method}-nodes", **more)


def one_method(lab: Lab, method: str, plain: Spec, gated: Spec) -> dict[str, Any]:
    got = on_and_off(lab, lab.engine(gated), ASK, method=method)
    if lab.args.alone:
        lab.stop(gated.name)
    other = lab.ask(lab.engine(plain), "output", **ASK)
    if lab.args.alone:
        lab.stop(plain.name)
    for which, own in got.items():
        lab.add(method=method, layers=which, against=plain.name, **difference(own, other))
    return got
