"""Tokens per second with many requests at once: 256 prompts of 512 tokens, 128 new ones each.

What to expect of 25 % skipped, for the shape of Qwen2.5-7B on an H200 (arithmetic on the measured speeds of docs/gpu.md):
a prompt's token is 13.2 GFLOP, 87 % of it MLPs; a decode step of 256 rows lies where an MLP is bound by arithmetic (about 170
us) rather than by its weights (100 us), and is about 55 % MLPs. Prompts are about 70 % of the time.

- layers forced off: prompts 1 / (1 - 0.25 x 0.87) = 1.28x at most, decode 1.16x: together about 1.24x at most;
- a quarter of the tokens in every layer (routers of random weights; the threshold is moved until the counters say a quarter
  of the prompts' MLPs): prompts run their packed rows, 1.15x at most with a grouped product that is 10 % slower a row than
  cuBLAS; a decode step of 256 rows skips nothing, for some row needs each MLP: together about 1.10x at most.
"""

from __future__ import annotations

from lab import Engine, Lab
from shapes import SHARE


def run(lab: Lab) -> None:
    args = lab.args
    size = {"requests": args.requests, "prompt": args.prompt, "new": args.new}
    by_token = lab.spec("tokens", {"gate": f"learned:{lab.work}/by_token.pth@{SHARE}"})
    limits: dict[str, float] = {}

    def measure(engine: Engine, number: int, label: str) -> None:
        gated = engine.spec.sedac is not None
        if gated:
            lab.ask(engine, "counts", reset=True)
        found = lab.ask(engine, "throughput", within=180, seed=number + 1, **size)
        if number >= 0:
            ratio = lab.ask(engine, "counts")["status"][0]["skip_ratio"] if gated else 0.0
            lab.add(round=number, batch=args.requests, engine=label, skip_ratio=ratio, **found)

    def work(engine: Engine, number: int) -> None:
        if engine.spec.sedac is None:
            measure(engine, number, "plain")
        elif engine.name == "tokens":
            if engine.name not in limits:
                limits[engine.name] = tune(lab, engine)
            measure(engine, number, "a quarter of the tokens")
            if number == 0:
                lab.ask(engine, "limits", values=[1e9])
                measure(engine, number, "routers, nothing skipped")
                lab.ask(engine, "limits", values=[limits[engine.name]])
        else:
            for share in (0.0, SHARE, 0.5):
                lab.ask(engine, "force", off=lab.off(share))
                measure(engine, number, f"forced {share:.0%}")

    rounds = args.throughput_rounds
    lab.interleave([lab.plain(), lab.forced("auto"), by_token], rounds, work)


def tune(lab: Lab, engine: Engine) -> float:
    """The threshold at which prompts skip a quarter of their MLPs, by halving."""
    low, high = -8.0, 8.0
    limit = 0.0
    for _ in range(13):
        limit = (low + high) / 2
        lab.ask(engine, "limits", values=[limit])
        lab.ask(engine, "counts", reset=True)
        lab.ask(engine, "throughput", requests=8, prompt=lab.args.prompt, new=1)
        ratio = lab.ask(engine, "counts")["status"][0]["skip_ratio"]
        if abs(ratio - SHARE) < 0.005:
            break
        low, high = (limit, high) if ratio > SHARE else (low, limit)
    lab.document["parts"]["throughput"]["by_token"] = {"limit": limit, "skip_ratio_of_prompts": ratio}
    return limit
