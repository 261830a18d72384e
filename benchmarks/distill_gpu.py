"""What the distillations are worth on a GPU: ghost KV, the latch form, rank by importance against uniform. About 7 minutes.

    python benchmarks/distill_gpu.py --model MODEL --train TRAIN.txt --evaluate OTHER.txt --out FOLDER [--only ghost,latch,rank]

Every figure is made by the `sedac` command line, its JSON in FOLDER with the command that made it; `summary.json` has the
figures side by side. Training sees TRAIN alone, `validate` sees OTHER alone. Seven minutes are short: what ranks are worth
shows with `--only rank --scale 4 --compile`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("ghost", "latch", "rank")


class Runs:
    """Each run's document and command, in the folder, as soon as it is there."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.made: dict[str, Any] = {}
        args.out.mkdir(parents=True, exist_ok=True)

    @property
    def compiled(self) -> tuple[str, ...]:
        return ("--compile",) if self.args.compile else ()

    def sedac(self, name: str, *words: object) -> dict[str, Any]:
        command = [sys.executable, "-m", "sedac_cli", *map(str, words), "--model", str(self.args.model), "--json"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        began = time.monotonic()
        print(f"[{name}] {' '.join(command[2:])}", file=sys.stderr, flush=True)
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        seconds = time.monotonic() - began
        document: dict[str, Any] = {"name": name, "command": command[2:], "exit": done.returncode, "seconds": seconds}
        if done.stdout.strip():
            document["result"] = json.loads(done.stdout)
        (self.args.out / f"{name}.json").write_text(json.dumps(document, indent=1))
        print(f"[{name}] exit {done.returncode} after {seconds:.0f} s", file=sys.stderr, flush=True)
        self.made[name] = document
        return document.get("result", {})

    def distill(self, name: str, minutes: float, *words: object) -> tuple[Path, dict[str, Any]]:
        file = self.args.out / f"{name}.pth"
        found = self.sedac(
            f"distill_{name}", "distill", "--dataset", self.args.train, "--max-length", 512, "--batch-size",
            self.args.batch_size, "--minutes", minutes * self.args.scale, "--save", file, *words,
        )  # fmt: skip
        return file, found

    def validate(self, name: str, gate: str) -> dict[str, Any]:
        found = self.sedac(
            f"validate_{name}", "validate", "--dataset", self.args.evaluate, "--samples", self.args.samples,
            "--max-length", 512, "--batch-size", 32, "--gate", gate, "--data-dir", self.args.out, "--out",
            self.args.out / f"raw_{name}.json",
        )  # fmt: skip
        if not found:
            return {}
        return {
            "gate": gate,
            **{key: found["measures"][key] for key in ("skip_ratio", "ppl_ratio", "agreement", "kl")},
            "compute_saved": found["reality"]["compute_saved"],
            "intervals": {key: found["intervals"][key] for key in ("ppl_ratio", "agreement")},
        }


def ghost(runs: Runs) -> dict[str, Any]:
    """Layers in the deeper half, a third of the tokens: the ways, then the trained one on other text."""
    file, found = runs.distill(
        "ghost", 0.6, "--rival", "--ghost-kv", "--skip-layers", runs.args.span, "--gate", "random:0.3", "--rank", 48
    )
    return {
        "comparison": found.get("comparison"),
        "validate": runs.validate("ghost", f"ghost:{file}@random:0.3"),
    }


def latch(runs: Runs) -> dict[str, Any]:
    file, found = runs.distill("latch", 1.2, "--gate", "cascade", "--target-skip", 0.28, "--rank", 192, *runs.compiled)
    return {"curve": found.get("curve"), "validate": runs.validate("latch", f"cascade:{file}@0.28")}


def rank(runs: Runs) -> dict[str, Any]:
    """The same total rank, seed, data and time, spread two ways."""
    found: dict[str, Any] = {}
    for how in ("uniform", "importance"):
        file, made = runs.distill(
            f"rank_{how}", 0.7, "--target-skip", 0.28, "--rank", runs.args.rank, "--rank-by", how, *runs.compiled
        )
        found[how] = {
            "steps": made.get("steps"), "ranks": made.get("ranks"), "standin_cost": made.get("standin_cost"),
            "curve": made.get("curve"), "validate": runs.validate(f"rank_{how}", f"learned:{file}@0.28"),
        }  # fmt: skip
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True, help="text to distil on")
    parser.add_argument("--evaluate", type=Path, required=True, help="other text, to validate on")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--only", default=",".join(PARTS), help="some of " + ",".join(PARTS))
    parser.add_argument("--scale", type=float, default=1.0, help="factor on every training time")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--samples", type=int, default=200, help="sequences to validate on")
    parser.add_argument("--compile", action="store_true", help="torch.compile: pays from about four minutes a run")
    parser.add_argument("--span", default="16..21", help="layers that ghost KV skips")
    parser.add_argument("--rank", type=int, default=96, help="rank of the uniform stand-ins")
    args = parser.parse_args()
    unknown = set(args.only.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"--only: {', '.join(sorted(unknown))} is not among {', '.join(PARTS)}")
    runs = Runs(args)
    summary: dict[str, Any] = {"arguments": {key: str(value) for key, value in vars(args).items()}}
    for name in args.only.split(","):
        summary[name] = {"ghost": ghost, "latch": latch, "rank": rank}[name](runs)
        summary["seconds"] = {key: round(value["seconds"], 1) for key, value in runs.made.items()}
        (args.out / "summary.json").write_text(json.dumps(summary, indent=1))
    print(json.dumps(summary, indent=1))
    return max(document["exit"] for document in runs.made.values())


if __name__ == "__main__":
    sys.exit(main())
