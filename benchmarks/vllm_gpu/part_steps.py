"""Milliseconds of a decode step: plain vLLM, and layers forced off in each way a gated MLP can run.

The target: nothing off costs at most 2 % of plain vLLM; 25 and 50 % off bring 1.18x and 1.45x at one sequence.
"""

from __future__ import annotations

from typing import Any

from lab import Engine, Lab, Spec, clocks


def shares(engine: Engine, args: Any) -> list[float | None]:
    return [float(x) for x in args.shares.split(",")] if engine.spec.forced else [None]


def measure(lab: Lab, specs: list[Spec], batches: list[int], rounds: int, **more: Any) -> None:
    for batch in batches:

        def work(engine: Engine, number: int, batch: int = batch) -> None:
            for share in shares(engine, lab.args):
                if share is not None:
                    lab.ask(engine, "force", off=lab.off(share))
                found = lab.ask(engine, "steps", batch=batch, count=lab.args.steps if number >= 0 else 8)
                if number >= 0:
                    lab.add(round=number, batch=batch, engine=engine.name, share=share, **found, **more)

        lab.interleave(specs, rounds, work)
        lab.rows.append({"batch": batch, "clocks": clocks()})


def ways(lab: Lab) -> list[Spec]:
    """Engines named on the command line: plain, silu, never, nodes, kernels; WAY:NAME=VALUE,.. is a variant of a way."""
    made = []
    for name in lab.args.engines.split(";"):
        way, _, variant = name.partition(":")
        if way == "plain":
            made.append(lab.plain())
        elif way == "silu":
            made.append(lab.fused())
        elif way == "never":
            made.append(lab.spec("never", {"gate": "never"}))
        else:
            made.append(lab.forced(way, name, variant=variant))
    return made


def run(lab: Lab) -> None:
    measure(lab, ways(lab), [int(x) for x in lab.args.batches.split(",")], lab.args.rounds)


def runners(lab: Lab) -> None:
    """Both of vLLM's model runners."""
    for which in ("0", "1"):
        environment = {"VLLM_USE_V2_MODEL_RUNNER": which}
        specs = [
            lab.plain(f"plain-V{int(which) + 1}", environment=environment),
            *(lab.forced(way, f"{way}-V{int(which) + 1}", environment=environment) for way in ("nodes", "kernels")),
        ]
        measure(lab, specs, [1, 8], max(2, lab.args.rounds // 2), runner=f"V{int(which) + 1}")
        gated = lab.document["engines"][specs[1].name]["status"][0]["runner"]
        lab.document["parts"]["runners"][f"V{int(which) + 1}"] = {"reported": gated}
        for spec in specs:
            lab.stop(spec.name)
