"""Tensor parallel over two GPUs: both ranks must report, decide alike, and give what one GPU gives but for the order of sums."""

from __future__ import annotations

import json
from typing import Any

from lab import FailedError, Lab, TooLateError
from part_decide import read_back
from part_equal import difference
from part_steps import measure
from shapes import SHARE


def run(lab: Lab) -> None:
    args = lab.args
    both = {"tensor_parallel_size": args.tp}
    greeting = lab.work / "handshakes"
    greeting.mkdir(exist_ok=True)
    learned = {"gate": f"learned:{lab.work}/by_layer.pth@{SHARE}"}
    specs = [
        lab.plain(f"plain-tp{args.tp}", **both),
        lab.fused(f"silu-tp{args.tp}", **both),
        lab.forced("nodes", f"nodes-tp{args.tp}", environment={"SEDAC_HANDSHAKE_DIR": str(greeting)}, **both),
        lab.forced("kernels", f"kernels-tp{args.tp}", **both),
        lab.spec(f"learned-tp{args.tp}", learned, **both),
    ]
    alone = [lab.fused("silu-tp1"), lab.forced("nodes", "nodes-tp1")]
    got: dict[str, Any] = {}
    args.most = max(args.most, len(specs) + len(alone))
    if not args.alone:
        lab.those_that_start([*specs, *alone])
    ask = {"new": args.tokens, "count": 4, "length": 60}
    for spec in [*specs, *alone]:
        try:
            engine = lab.engine(spec)
            for share in (0.0, SHARE) if spec.forced else (0.0,):
                if spec.forced:
                    lab.ask(engine, "force", off=lab.off(share))
                if spec.sedac:
                    lab.ask(engine, "counts", reset=True)
                got[f"{spec.name} {share:.0%}"] = lab.ask(engine, "output", **ask)
                if spec.sedac:
                    ranks = lab.ask(engine, "counts")["status"]
                    lab.add(
                        engine=engine.name, what="ranks", share=share, ranks=len(ranks), tokens=[r["tokens"] for r in ranks],
                        alike=all(r["skipped"] == ranks[0]["skipped"] and r["digest"] == ranks[0]["digest"] for r in ranks),
                        skip_ratio=ranks[0]["skip_ratio"],
                    )  # fmt: skip
        except (FailedError, TooLateError) as error:
            lab.problem(f"tp2, {spec.name}: {error}")
            lab.check(30)
    reports = [json.loads(path.read_text()) for path in sorted(greeting.glob("worker-*.json"))]
    digests = {r["digest"] for r in reports}
    lab.add(
        what="handshake", workers=len(reports), expected=args.tp, ranks=sorted(r["rank"] for r in reports),
        one_digest=len(digests) == 1,
    )  # fmt: skip
    two, one = f"tp{args.tp}", "tp1"
    for name, against in (
        (f"nodes-{two} 0%", f"silu-{two} 0%"), (f"kernels-{two} 0%", f"silu-{two} 0%"), (f"nodes-{two} 0%", f"nodes-{one} 0%"),
        (f"nodes-{two} 25%", f"nodes-{one} 25%"), (f"learned-{two} 0%", f"nodes-{two} 25%"), (f"nodes-{two} 25%", f"nodes-{two} 0%"),
    ):  # fmt: skip
        if name in got and against in got:
            lab.add(engine=name, against=against, **difference(got[name], got[against]))
    rounds = max(3, args.rounds // 2)
    measure(lab, [specs[0], specs[2]], [1, 32], rounds)
    for batch in (1, 32):
        engine = lab.engine(specs[4])
        for number in range(-1, rounds):
            lab.ask(engine, "counts", reset=True)
            found = lab.ask(engine, "steps", batch=batch, count=args.steps)
            if number >= 0:
                lab.add(
                    round=number,
                    batch=batch,
                    engine=engine.name,
                    share=None,
                    **found,
                    **read_back(lab, engine, lab.off(SHARE)),
                )
