"""One small model with chosen layers off, asked of three sides: plain vLLM, gated vLLM, and the Hugging Face runtime.
What vLLM has read and chosen, the last reads as it stands: so every token counts, whoever would have chosen another.

    got = on_and_off(lab, engine, ask, what="int4")                # two outputs, a row of what was skipped and by which classes
    scored = reference(lab, "score", 240, do="score", runs=runs("int4", folder, got, PROMPTS))
    compare(lab, scored, "int4", got, what="int4")                 # a row for each output
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lab import Engine, Lab

OFF = [1, 3]
NEW = 16
STATES: dict[str, list[int]] = {"on": [], "off": OFF}
DENSE = "off, all run"
"""What Hugging Face says to the tokens of `off` with every MLP: an error of ours would be about as far from them as this."""


def same_kernels(**compilation: Any) -> dict[str, Any]:
    """Kernels of their own where compiled code would round in its own way, and none of them fused: what stands beside an opaque
    MLP cannot be fused with it."""
    kernels = {
        "custom_ops": ["+silu_and_mul", "+gelu_and_mul", "+quant_fp8"],
        "pass_config": {"fuse_norm_quant": False, "fuse_act_quant": False},
    }
    return {"compilation": kernels | compilation}


def on_and_off(lab: Lab, engine: Engine, ask: dict[str, Any], **row: Any) -> dict[str, Any]:
    got = {}
    for name, off in STATES.items():
        lab.ask(engine, "force", off=off)
        lab.ask(engine, "counts", reset=True)
        got[name] = lab.ask(engine, "output", **ask)
    status = lab.ask(engine, "counts")["status"][0]
    expected = [status["tokens"] if layer in OFF else 0 for layer in range(len(status["skipped"]))]
    lab.add(
        **row, engine=engine.name, tokens=status["tokens"], skipped=status["skipped"], packs=status.get("packs"),
        runner=status["runner"], exactly_the_layers_off=status["skipped"] == expected, **lab.ask(engine, "linears"),
    )  # fmt: skip
    return got


def runs(name: str, model: str, got: dict[str, Any], prompts: Sequence[list[int]], inputs: str = "") -> dict[str, Any]:
    """What to ask of `reference.py score`."""
    made = {}
    for which, read, off in (*((state, state, off) for state, off in STATES.items()), (DENSE, "off", [])):
        sequences = [prompt + new for prompt, new in zip(prompts, got[read]["tokens"], strict=True)]
        gate = {"gate": "forced:" + ("/".join(map(str, off)) or "none")}
        made[f"{name} {which}"] = {"model": model, "gate": gate, "sequences": sequences, "inputs": inputs}
    return made


def compare(lab: Lab, scored: dict[str, Any], name: str, got: dict[str, Any], **row: Any) -> None:
    failed = [scored[f"{name} {which}"] for which in (*STATES, DENSE) if isinstance(scored[f"{name} {which}"], dict)]
    if failed:
        lab.problem(f"{name} under Hugging Face: {failed[0]['error']}")
        return
    for which in STATES:
        prompts, new, theirs = got[which]["prompt_logprobs"], got[which]["logprobs"], scored[f"{name} {which}"]
        found = {
            "prompts": apart(prompts, [all_[: len(own)] for own, all_ in zip(prompts, theirs, strict=True)]),
            "new_tokens": apart(new, [all_[len(own) :] for own, all_ in zip(prompts, theirs, strict=True)]),
        }
        if which == "off":
            found["effect_of_the_gate"] = apart(theirs, scored[f"{name} {DENSE}"])
        lab.add(**row, layers=which, against="Hugging Face", **found)


def apart(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> dict[str, float]:
    """Log-probabilities of the same tokens."""
    by = [abs(a - b) for p, q in zip(ours, theirs, strict=True) for a, b in zip(p, q, strict=True)]
    return {"mean": sum(by) / len(by), "largest": max(by), "tokens": len(by)}
