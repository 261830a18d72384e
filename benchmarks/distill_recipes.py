"""Recipes of `sedac distill` side by side: the same model, text, steps and settings, one thing changed in each.

    python benchmarks/distill_recipes.py --model MODEL --train TRAIN.txt --evaluate OTHER.txt --out FOLDER \\
        --recipes base,seed,hidden:0.1,hidden:1,sees,gains --devices 0,1 --steps 1200 --compile

Each recipe trains in a process of its own with the product's loop and draws its curve on OTHER, in the training form;
FOLDER keeps its document, its log and `summary.json`. What the recipes are: `recipe_trainers.py`. `--recipe NAME` runs one
in this process. The last `--reserve` seconds of `--minutes` are for the curves: who still trains then draws the curve of
what it has, with a learning rate that has not come down, and its document says so.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

BEGAN = time.monotonic()
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from sedac_cli.config import TextSpec  # noqa: E402

SPEC = re.compile(r"(base|seed|hidden|layers|sees|gains)(:[\d.]+(e-?\d+)?)?")
"""Who only starts the others is spared the import of torch."""
NETS = (0.25, 0.5)
FIGURES = ("ppl_ratio", "agreement", "kl")
SHARES = "0.1,0.2,0.25,0.285,0.35,0.45,0.55,0.62"
SHARED = ("model", "train", "evaluate", "out", "steps", "reserve", "batch_size", "max_length", "rank", "target_skip",
          "held", "shares", "seed")  # fmt: skip


# One recipe ------------------------------------------------------------------------------------------------------------


def run_one(args: argparse.Namespace) -> int:
    from recipe_trainers import Stop, make
    from tqdm import tqdm

    from sedac_cli.models import load_model
    from sedac_cli.pipeline.distill.curve import measure_curve
    from sedac_cli.pipeline.distill.run import read_windows, split
    from sedac_cli.pipeline.distill.train import DistillOptions

    stop = Stop(deadline=BEGAN + 60 * args.minutes - args.reserve)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: setattr(stop, "asked", True))
    if args.compile:
        import torch._dynamo.config

        # Of 8 that are allowed, today's recipe needs 6 graphs of a layer and `sees` 7; past the limit it would run eager.
        torch._dynamo.config.recompile_limit = 32
    loaded = load_model(args.model)
    text = TextSpec(args.train, samples=20000, max_length=args.max_length)
    other = TextSpec(args.evaluate, samples=args.held, max_length=args.max_length)
    options = DistillOptions(
        steps=args.steps, batch_size=args.batch_size, rank=args.rank, target_skip=args.target_skip, seed=args.seed,
        compile=args.compile,
    )  # fmt: skip
    held = read_windows(other, loaded.tokenizer)
    train = split(windows_of(text, loaded.tokenizer), args.seed)[1]
    trainer = make(args.recipe, loaded, train, options, stop, partial(tqdm, mininterval=20))
    document = {
        "recipe": args.recipe, "command": " ".join(sys.argv), "arguments": vars(args), "device": device_name(),
        "setup_seconds": time.monotonic() - BEGAN, "held": {"text": args.evaluate, "windows": len(held)},
    }  # fmt: skip
    say(f"{len(train)} windows to train on after {document['setup_seconds']:.0f} s")
    trainer.run()
    say(f"{trainer.step} steps in {trainer.elapsed:.0f} s")
    document |= trainer.recipe(text) | {"costs": trainer.costs(), "learned": trainer.learned(), "curve": []}
    document |= {"ended_early": trainer.step < args.steps, "compiled": compiled_facts() if args.compile else None}
    file = args.out / f"{file_name(args.recipe)}.json"
    write(file, document)  # who is killed while drawing the curve leaves what it trained with
    if trainer.step:
        document["curve"] = with_net(measure_curve(trainer, held, floats(args.shares)), document["costs"])
    document["total_seconds"] = time.monotonic() - BEGAN
    write(file, document)
    say(f"curve drawn, {document['total_seconds']:.0f} s in all")
    return 0


def windows_of(text: TextSpec, tokenizer: Any, at_once: int = 1024) -> Any:
    """The windows of `read_windows`, tokenized many pieces at a time, so that all cores have work."""
    import torch

    from sedac_cli.corpus import blocks, read_documents, shuffled

    pieces = shuffled(itertools.chain.from_iterable(map(blocks, read_documents(text))), text.seed)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows: list[list[int]] = []
    pending: list[int] = []
    for many in batched(pieces, at_once):
        for ids in tokenizer(many, add_special_tokens=False, verbose=False)["input_ids"]:
            pending += (end if len(pending) % text.max_length else []) + ids
        cut = len(pending) // text.max_length * text.max_length
        rows += [pending[i : i + text.max_length] for i in range(0, cut, text.max_length)]
        pending = pending[cut:]
        if len(rows) >= text.samples:
            break
    return torch.tensor(rows[: text.samples], dtype=torch.int32)


def batched(items: Iterator[str], size: int) -> Iterator[list[str]]:
    while many := list(itertools.islice(items, size)):
        yield many


def with_net(curve: list[dict[str, float]], costs: dict[str, float]) -> list[dict[str, float]]:
    """Each row with the share of all MLP compute that is saved once stand-ins and deciding are paid for."""
    return [row | {"net": row["share"] * (1 - costs["standin"]) - costs["deciding"]} for row in curve]


def compiled_facts() -> dict[str, Any]:
    """How far torch.compile really went: graphs, and frames it gave up on."""
    from torch._dynamo.utils import counters

    kept = {key: dict(counters[key]) for key in ("stats", "frames", "graph_break", "unimplemented")}
    return json.loads(json.dumps(kept, default=str))


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


# Side by side ------------------------------------------------------------------------------------------------------------


def run_all(args: argparse.Namespace) -> int:
    recipes = args.recipes.split(",")
    wrong = [recipe for recipe in recipes if not SPEC.fullmatch(recipe) or recipes.count(recipe) > 1]
    if wrong:
        raise SystemExit(f"--recipes: {', '.join(wrong)}: not known, or there twice")
    args.out.mkdir(parents=True, exist_ok=True)
    running = {recipe: start(args, recipe, place) for place, recipe in enumerate(recipes)}
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: [child.terminate() for child in running.values()])
    exits = wait(running, BEGAN + 60 * args.minutes)
    found = {recipe: read(args, recipe) | {"exit": exits[recipe]} for recipe in recipes}
    summary = {
        "command": " ".join(sys.argv), "arguments": vars(args), "seconds": time.monotonic() - BEGAN,
        "table": {name: row_of(document) for name, document in found.items()}, "recipes": found,
    }  # fmt: skip
    write(args.out / "summary.json", summary)
    print(table(summary["table"]))
    return int(any(exits.values()))


def start(args: argparse.Namespace, recipe: str, place: int) -> subprocess.Popen[bytes]:
    """A process of its own group, so that its compile workers end with it."""
    devices, count = args.devices.split(","), len(args.recipes.split(","))
    cores = max(1, (os.cpu_count() or 1) // count)
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": devices[place % len(devices)],
        "TOKENIZERS_PARALLELISM": "true",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cores)),
        "RAYON_NUM_THREADS": os.environ.get("RAYON_NUM_THREADS", str(cores)),
        "TORCHINDUCTOR_COMPILE_THREADS": os.environ.get("TORCHINDUCTOR_COMPILE_THREADS", str(min(cores, 8))),
    }
    left = args.minutes - (time.monotonic() - BEGAN) / 60
    command = [sys.executable, str(Path(__file__).resolve()), "--recipe", recipe, "--minutes", f"{left:.3f}"]
    command += itertools.chain.from_iterable([f"--{key.replace('_', '-')}", str(getattr(args, key))] for key in SHARED)
    command += ["--compile"] if args.compile else []
    (args.out / f"{file_name(recipe)}.json").unlink(missing_ok=True)
    with (args.out / f"{file_name(recipe)}.log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def wait(running: dict[str, subprocess.Popen[bytes]], limit: float) -> dict[str, int]:
    exits: dict[str, int] = {}
    while len(exits) < len(running):
        for recipe in running.keys() - exits.keys():
            code = running[recipe].poll()
            if code is None and time.monotonic() >= limit:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(running[recipe].pid, signal.SIGKILL)
                code = running[recipe].wait()
            if code is not None:
                exits[recipe] = code
                say(f"[{recipe}] exit {code} after {time.monotonic() - BEGAN:.0f} s")
        time.sleep(0.2)
    return exits


def read(args: argparse.Namespace, recipe: str) -> dict[str, Any]:
    """A recipe's document; of one that left none, the end of its log."""
    file = args.out / f"{file_name(recipe)}.json"
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    last = file.with_suffix(".log").read_text(encoding="utf-8", errors="replace")[-2000:]
    say(f"[{recipe}] left no document:\n{last}")
    return {"recipe": recipe, "log": last}


def row_of(document: dict[str, Any]) -> dict[str, Any]:
    curve = document.get("curve", [])
    at = {str(net): at_net(curve, net) for net in NETS}
    return {"steps": document.get("steps"), "seconds": document.get("seconds"), "exit": document["exit"], "net": at}


def at_net(curve: list[dict[str, float]], net: float) -> dict[str, float] | None:
    """Linear between the two rows around `net`; nothing outside the curve."""
    rows = sorted(curve, key=lambda row: row["net"])
    for low, high in itertools.pairwise(rows):
        if low["net"] <= net <= high["net"]:
            part = (net - low["net"]) / ((high["net"] - low["net"]) or 1.0)
            return {key: low[key] + part * (high[key] - low[key]) for key in FIGURES}
    return None


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Per recipe: steps, seconds, and at each net saving ppl ratio, agreement, KL."""
    heads = "".join(f"   net {net:.2f}: ppl ratio   agreement      KL" for net in NETS)
    lines = [f"{'recipe':<14}{'steps':>7}{'seconds':>9}{heads}"]
    for name, row in rows.items():
        line = f"{name:<14}{row['steps'] or 0:>7}{row['seconds'] or 0:>9.0f}"
        for at in row["net"].values():
            words = [f"{at[key]:.4f}" if at else "-" for key in FIGURES]
            line += f"{words[0]:>22}{words[1]:>12}{words[2]:>8}"
        lines.append(line)
    return "\n".join(lines)


# Both ------------------------------------------------------------------------------------------------------------------


def file_name(recipe: str) -> str:
    return re.sub(r"[^\w.-]", "_", recipe)


def floats(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def write(file: Path, document: dict[str, Any]) -> None:
    """Whole or not at all: a process may be ended at any time."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(document, indent=1, default=str), encoding="utf-8")
    part.replace(file)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--recipes", help="several, side by side: base,seed,hidden:W,layers:W,sees[:LR],gains[:LR]")
    which.add_argument("--recipe", help="one, in this process")
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True, help="text to distil on")
    parser.add_argument("--evaluate", required=True, help="other text, for the curves")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--devices", default="0", help="GPUs for --recipes, in turn")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--minutes", type=float, default=9.0, help="at most, start and curve included")
    parser.add_argument("--reserve", type=float, default=75.0, help="seconds of --minutes for the curve")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--rank", type=int, default=192)
    parser.add_argument("--target-skip", type=float, default=0.28)
    parser.add_argument("--held", type=int, default=192, help="windows of the other text")
    parser.add_argument("--shares", default=SHARES, help="shares of MLPs to skip, for the curve")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile, as `sedac distill --compile`")
    args = parser.parse_args()
    return run_all(args) if args.recipes else run_one(args)


if __name__ == "__main__":
    sys.exit(main())
