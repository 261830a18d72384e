"""What deciding costs: gates that decide against flags that are forced, on the same decisions.

The artifacts are made so that what the gates decide is known beforehand: the cascade (three probes of rank 64) lets every
token exit at its last checkpoint, the learned gate (a router per layer, stand-ins of rank 192) skips every fourth layer. The
same layers are forced off in the engine beside it. That the decisions are the same is read back from the counters of the very
steps that were timed: a row says so, and a row that says no is no measurement.
"""

from __future__ import annotations

from typing import Any

from lab import Engine, Lab, Spec
from shapes import SHARE, checkpoints


def gates(lab: Lab, way: str) -> list[tuple[Spec, list[int]]]:
    """(engine, layers it must skip), by name: cascade, learned (with stand-ins), routers (without)."""
    layers = lab.shape["num_hidden_layers"]
    points = checkpoints(layers)
    cascade = {
        "probe_dir": str(lab.work), "probe_layers": points, "adaptive": False, "thresholds": [-1e9, -1e9, 1e9], "mlp": way,
    }  # fmt: skip
    at_end, spread = list(range(points[-1], layers)), lab.off(SHARE)
    made = [
        (lab.spec(f"cascade-{way}", cascade), at_end),
        (lab.spec(f"learned-{way}", {"gate": f"learned:{lab.work}/by_layer.pth@{SHARE}", "mlp": way}), spread),
        (lab.spec(f"routers-{way}", {"gate": f"learned:{lab.work}/by_layer_zero.pth@{SHARE}", "mlp": way}), spread),
    ]
    if lab.args.adaptive:
        adaptive = cascade | {"adaptive": True, "exit_rates": [0.0, 0.0, 1.0], "calibration_steps": 1}
        made.append((lab.spec(f"adaptive-{way}", adaptive), at_end))
    return [pair for pair in made if pair[0].name.partition("-")[0] in lab.args.gates.split(",")]


def run(lab: Lab) -> None:
    for way in lab.args.ways.split(","):
        for batch in [int(x) for x in lab.args.batches.split(",")]:
            one_way(lab, way, batch)
        for spec, _ in gates(lab, way):
            lab.stop(spec.name)


def one_way(lab: Lab, way: str, batch: int) -> None:
    chosen = gates(lab, way)
    wanted = {spec.name: off for spec, off in chosen}

    def work(engine: Engine, number: int) -> None:
        count = lab.args.steps if number >= 0 else 8
        if engine.spec.sedac is None:
            found = lab.ask(engine, "steps", batch=batch, count=count)
            if number >= 0:
                lab.add(round=number, batch=batch, engine="plain", off="none", **found)
            return
        for off in [wanted[engine.name]] if engine.name in wanted else unique(list(wanted.values())):
            if engine.name not in wanted:
                lab.ask(engine, "force", off=off)
            lab.ask(engine, "counts", reset=True)
            found = lab.ask(engine, "steps", batch=batch, count=count)
            same = read_back(lab, engine, off)
            if number >= 0:
                what = {"engine": engine.name, "way": way, "off": ",".join(map(str, off))}
                lab.add(round=number, batch=batch, **what, **found, **same)

    lab.interleave([lab.plain(), lab.forced(way), *(spec for spec, _ in chosen)], lab.args.rounds, work)


def unique(sets: list[list[int]]) -> list[list[int]]:
    return [off for i, off in enumerate(sets) if off not in sets[:i]]


def read_back(lab: Lab, engine: Engine, off: list[int]) -> dict[str, Any]:
    """Whether the engine skipped exactly these layers, for every token since the last reset."""
    status = lab.ask(engine, "counts")["status"][0]
    skipped = {layer: count for layer, count in enumerate(status["skipped"]) if count}
    return {
        "same_decisions": skipped == dict.fromkeys(off, status["tokens"]) and status["tokens"] > 0,
        "skip_ratio": status["skip_ratio"],
    }
