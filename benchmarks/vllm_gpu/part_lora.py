"""Adapters (LoRA) on attention and MLP: one batch with requests of two adapters and of none, in the same captured graphs.

Each request is compared with the Hugging Face runtime, in float32, with its adapter added to the weights and the same layers off;
layers that are off must be counted, exactly those, for every token. The adapters' kernels add in no fixed order, so nothing need be
the same to the bit: the row `again` says how far plain vLLM is from what it said before.
"""

from __future__ import annotations

from typing import Any

from compare import NEW, apart, compare, on_and_off, runs, same_kernels
from lab import Lab
from part_equal import PROMPTS, difference, reference, small, small_engine

SIZES = [1, 8, 16]
"""Of captured graphs. Twelve requests: their steps are padded to sixteen rows."""


def run(lab: Lab) -> None:
    folder, _ = small(lab, "qwen2")
    made = reference(lab, "adapters", 120, do="adapters", model=str(folder), folder=str(lab.work / "lora"), count=2)
    adapters = {"none": None} | {str(n): one["adapter"] for n, one in enumerate(made, 1)}
    merged = [str(folder), *(one["merged"] for one in made)]
    ask = {
        "new": NEW, "prompts": [prompt for prompt in PROMPTS for _ in adapters],
        "adapters": list(adapters.values()) * len(PROMPTS),
    }  # fmt: skip
    more = small_engine(lab, folder) | {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    more |= same_kernels(cudagraph_capture_sizes=SIZES)
    plain, gated = lab.plain("lora-silu", **more), lab.forced("nodes", "lora-nodes", **more)
    if not lab.args.alone:
        lab.those_that_start([plain, gated])
    got = on_and_off(lab, lab.engine(gated), ask)
    if lab.args.alone:
        lab.stop(gated.name)
    engine = lab.engine(plain)
    other, again = (lab.ask(engine, "output", **ask) for _ in range(2))
    for which, own in got.items():
        lab.add(layers=which, against=plain.name, **difference(own, other))
    lab.add(layers="again", against=plain.name, **difference(again, other))
    lab.stop_all()
    wanted, mine = {}, {}
    for n, name in enumerate(adapters):
        mine[name] = {which: every(output, n, len(adapters)) for which, output in got.items()}
        wanted |= runs(name, merged[n], mine[name], PROMPTS)
        wanted[f"{name} without"] = wanted[f"{name} on"] | {"model": str(folder)}
    scored = reference(lab, "score-lora", 240, do="score", runs=wanted)
    for name in adapters:
        compare(lab, scored, name, mine[name], adapter=name)
        if name != "none":
            lab.add(adapter=name, effect_of_the_adapter=apart(scored[f"{name} on"], scored[f"{name} without"]))


def every(output: dict[str, Any], first: int, step: int) -> dict[str, Any]:
    """The requests of one adapter, which take turns in the batch."""
    return {key: output[key][first::step] for key in ("tokens", "logprobs", "prompt_logprobs")}
