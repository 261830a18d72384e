"""Tensor parallel over two GPUs: both ranks must report, decide alike, and give what one GPU gives but for the order of sums.

An engine that does not come up, or fails at what it is asked, is a problem in the document; the others are measured without it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab import Engine, FailedError, Lab, Spec, TooLateError
from part_decide import read_back
from part_equal import difference
from part_steps import measure
from shapes import SHARE


def engines(lab: Lab, greeting: Path) -> dict[str, Spec]:
    """By the words of --tp-engines; `one` is two engines on one GPU, to compare tokens with."""
    tp, both = lab.args.tp, {"tensor_parallel_size": lab.args.tp}
    learned = {"gate": f"learned:{lab.work}/by_layer.pth@{SHARE}"}
    made = {
        "plain": [lab.plain(f"plain-tp{tp}", **both)],
        "silu": [lab.fused(f"silu-tp{tp}", **both)],
        "nodes": [lab.forced("nodes", f"nodes-tp{tp}", environment={"SEDAC_HANDSHAKE_DIR": str(greeting)}, **both)],
        "kernels": [lab.forced("kernels", f"kernels-tp{tp}", **both)],
        "learned": [lab.spec(f"learned-tp{tp}", learned, **both)],
        "one": [lab.fused("silu-one"), lab.forced("nodes", "nodes-one")],
    }  # fmt: skip
    return {spec.name: spec for word in lab.args.tp_engines for spec in made[word]}


def run(lab: Lab) -> None:
    args = lab.args
    greeting = lab.work / "handshakes"
    greeting.mkdir(exist_ok=True)
    specs = engines(lab, greeting)
    if not args.alone:
        args.most = max(args.most, len(specs))
        lab.those_that_start(list(specs.values()))
    got: dict[str, Any] = {}
    for spec in specs.values():
        attempt(lab, spec, lambda engine: outputs(lab, engine, got))
    nodes, plain, learned = (f"{name}-tp{args.tp}" for name in ("nodes", "plain", "learned"))
    if nodes in specs:
        greeted(lab, greeting)
    for name, against in (
        (f"nodes-tp{args.tp} 0%", f"silu-tp{args.tp} 0%"), (f"kernels-tp{args.tp} 0%", f"silu-tp{args.tp} 0%"),
        (f"nodes-tp{args.tp} 0%", "nodes-one 0%"), (f"silu-tp{args.tp} 0%", "silu-one 0%"),
        (f"nodes-tp{args.tp} 25%", "nodes-one 25%"), (f"learned-tp{args.tp} 0%", f"kernels-tp{args.tp} 25%"),
        (f"nodes-tp{args.tp} 25%", f"nodes-tp{args.tp} 0%"),
    ):  # fmt: skip
        if name in got and against in got:
            lab.add(engine=name, against=against, **difference(got[name], got[against]))
    rounds = max(3, args.rounds // 2)
    timed = [specs[name] for name in (plain, nodes, f"kernels-tp{args.tp}") if name in specs]
    try:
        measure(lab, timed, [1, 32], rounds)
    except (FailedError, TooLateError) as error:
        lab.problem(f"tp2, step times: {error}")
    if learned in specs:
        attempt(lab, specs[learned], lambda engine: decided(lab, engine, rounds))


def attempt(lab: Lab, spec: Spec, work: Callable[[Engine], None]) -> None:
    if spec.name in lab.lost:
        return
    try:
        work(lab.engine(spec))
    except (FailedError, TooLateError) as error:
        lab.problem(f"tp2, {spec.name}: {error}")
        lab.check(30)


def outputs(lab: Lab, engine: Engine, got: dict[str, Any]) -> None:
    """Tokens, and what each rank says it skipped for them."""
    spec = engine.spec
    for share in (0.0, SHARE) if spec.forced else (0.0,):
        if spec.forced:
            lab.ask(engine, "force", off=lab.off(share))
        if spec.sedac:
            lab.ask(engine, "counts", reset=True)
        got[f"{spec.name} {share:.0%}"] = lab.ask(engine, "output", new=lab.args.tokens, count=4, length=60)
        if spec.sedac:
            ranks = lab.ask(engine, "counts")["status"]
            lab.add(
                engine=engine.name, what="ranks", share=share, ranks=len(ranks), tokens=[r["tokens"] for r in ranks],
                alike=all(r["skipped"] == ranks[0]["skipped"] and r["digest"] == ranks[0]["digest"] for r in ranks),
                skip_ratio=ranks[0]["skip_ratio"],
            )  # fmt: skip


def greeted(lab: Lab, greeting: Path) -> None:
    reports = [json.loads(path.read_text()) for path in sorted(greeting.glob("worker-*.json"))]
    lab.add(
        what="handshake", workers=len(reports), expected=lab.args.tp, ranks=sorted(r["rank"] for r in reports),
        one_digest=len({r["digest"] for r in reports}) == 1,
    )  # fmt: skip


def decided(lab: Lab, engine: Engine, rounds: int) -> None:
    """Step times of the gate that decides, with what it decided."""
    for batch in (1, 32):
        for number in range(-1, rounds):
            lab.ask(engine, "counts", reset=True)
            found = lab.ask(engine, "steps", batch=batch, count=lab.args.steps)
            if number < 0:
                continue
            same = read_back(lab, engine, lab.off(SHARE))
            lab.add(round=number, batch=batch, engine=engine.name, share=None, **found, **same)
