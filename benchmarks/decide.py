"""What does deciding cost, next to the MLP it may save? `make bench-decide`, a minute or two on a CPU.

    python benchmarks/decide.py --out benchmarks/results/decide.json [--model FOLDER] [--device cuda] [--dtype bfloat16]

Every gate decides on random states for one whole pass (`start` and `decide` at every layer); beside it every MLP of the model
runs on as many rows. A round is one sample of each, in turn, so that whatever else the machine does meets all; a figure is a
median of rounds. Probes and routers have random weights: what they decide is meaningless here, what they cost is not.

`share of MLP` is deciding over MLPs. It is also the break-even: a gate that skips a smaller share than that costs more than it
saves, and one above 100 % can never pay, whatever it skips.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from sedac_cli.artifacts.files import make_folder, write_json  # noqa: E402
from sedac_cli.artifacts.manifest import versions  # noqa: E402
from sedac_cli.config import ModelSpec  # noqa: E402
from sedac_cli.gates.adaptive import AdaptiveThresholds  # noqa: E402
from sedac_cli.gates.base import Gate, Guards  # noqa: E402
from sedac_cli.gates.cascade import CascadeGate, FixedGate  # noqa: E402
from sedac_cli.gates.entropy import EntropyGate  # noqa: E402
from sedac_cli.gates.learned import LearnedGate, Router  # noqa: E402
from sedac_cli.gates.lens import HeadLens, ProbeLens  # noqa: E402
from sedac_cli.gates.simple import AlwaysGate, RandomGate  # noqa: E402
from sedac_cli.gates.soft import SoftGate  # noqa: E402
from sedac_cli.gates.stability import StabilityGate  # noqa: E402
from sedac_cli.models import LoadedModel, load_model  # noqa: E402
from sedac_cli.probes import LREProbe  # noqa: E402
from sedac_cli.structure import Branch, Decoder  # noqa: E402

RANK = 64
ROUTER_WIDTH = 16
MLP = "mlp"


def make_gates(decoder: Decoder) -> dict[str, Gate]:
    """Each gate as its command would make it, with checkpoints at a quarter, half and three quarters of the depth."""
    layers, width = decoder.num_layers, decoder.hidden_size
    points = sorted({max(1, layers * part // 4) for part in (1, 2, 3)})
    guards = Guards(sinks=4)
    torch.manual_seed(0)

    def probes() -> dict[int, LREProbe]:
        return {layer: LREProbe(width, RANK).requires_grad_(False) for layer in points}

    limits = dict.fromkeys(points, 0.7)
    routers = {layer: Router(width, ROUTER_WIDTH).requires_grad_(False) for layer in range(layers)}
    for router in routers.values():
        router.weight.normal_()
        router.inner.normal_()
        router.outer.normal_()
    lens = EntropyGate.default_checks(layers, 0.7, 4, 4, Guards(4, 2, 1)) or [layers - 2]
    lens_probes = ProbeLens({layer: LREProbe(width, RANK).requires_grad_(False) for layer in lens})
    entropy = {"mean": 5.0, "sd": 2.0, "checks": lens, "min_exit_layer": 1, "guards": Guards(4, 2, 1)}
    return {
        "always": AlwaysGate(layers, layers // 2, guards),
        "random": RandomGate(layers, 0.3, 0, guards),
        "fixed": FixedGate(layers, {points[-1]: LREProbe(width, RANK).requires_grad_(False)}, {points[-1]: 0.7}, guards=guards),
        "cascade": CascadeGate(layers, probes(), limits, guards=guards),
        "cascade, adaptive": CascadeGate(layers, probes(), AdaptiveThresholds(dict.fromkeys(points, 0.2)), guards=guards),
        "soft": SoftGate(layers, probes(), limits, guards=guards),
        "stability": StabilityGate(layers, min_layer=min(4, layers - 1), guards=guards),
        "entropy, lens=head": EntropyGate(layers, HeadLens(decoder), **entropy),
        "entropy, lens=probes": EntropyGate(layers, lens_probes, **entropy),
        "learned": LearnedGate(layers, routers, 0.0, guards),
    }  # fmt: skip


def one_pass(gate: Gate, states: list[Tensor]) -> None:
    state = gate.start(states[0].shape[0], states[0].device)
    for layer, hidden in enumerate(states):
        gate.decide(layer, hidden, state)


def all_mlps(branches: tuple[Branch, ...], states: list[Tensor]) -> None:
    for branch, hidden in zip(branches, states, strict=True):
        out = branch.entry(hidden.unsqueeze(0))
        if branch.exit is not branch.entry:
            branch.exit(out)


def seconds(work: Callable[[], None], device: torch.device, least: float) -> float:
    """One sample: the work as often as fills `least` seconds, on average. A GPU is waited for once, at the end."""
    count, began = 0, time.perf_counter()
    while True:
        work()
        count += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
        took = time.perf_counter() - began
        if took >= least:
            return took / count


@torch.inference_mode()
def measure(loaded: LoadedModel, tokens: list[int], rounds: int, least: float) -> list[dict[str, Any]]:
    decoder, device = loaded.decoder, loaded.device
    gates = {name: gate.to(device) for name, gate in make_gates(decoder).items()}
    rows = []
    for n in tokens:
        generator = torch.Generator().manual_seed(n)
        dtype = next(decoder.branches[0].entry.parameters()).dtype
        states = [
            torch.randn(n, decoder.hidden_size, generator=generator).to(device, dtype) for _ in range(decoder.num_layers)
        ]  # fmt: skip
        works: dict[str, Callable[[], None]] = {MLP: lambda states=states: all_mlps(decoder.branches, states)}  # type: ignore[misc]
        for name, gate in gates.items():
            works[name] = lambda gate=gate, states=states: one_pass(gate, states)  # type: ignore[misc]
        for work in works.values():
            work()
        samples: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(rounds):
            for name, work in works.items():
                samples[name].append(seconds(work, device, least))
        median = {name: statistics.median(values) for name, values in samples.items()}
        for name in works:
            rows.append(
                {"gate": name, "tokens": n, "per_layer_us": median[name] / decoder.num_layers * 1e6,
                 "share_of_mlp": median[name] / median[MLP], "pass_seconds": samples[name]}
            )  # fmt: skip
        print(f"{n} tokens done", file=sys.stderr, flush=True)
    return rows


def show(rows: list[dict[str, Any]], tokens: list[int]) -> None:
    table = {(row["gate"], row["tokens"]): row for row in rows}
    head = "".join(f"{n:>10,} tokens" for n in tokens)
    print(f"{'us per layer (share of the MLP = break-even)':<46}\n{'':<22}{head}")
    for name in dict.fromkeys(row["gate"] for row in rows):
        cells = []
        for n in tokens:
            row = table[name, n]
            share = "" if name == MLP else f" {row['share_of_mlp']:>6.1%}"
            cells.append(f"{row['per_layer_us']:.1f}{share}")
        print(f"{name:<22}" + "".join(f"{cell:>17}" for cell in cells))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokens", default="1,8,512,4096")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--least", type=float, default=0.02, help="seconds that one sample fills")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "decide.json")
    args = parser.parse_args()
    tokens = [int(n) for n in args.tokens.split(",")]
    loaded = load_model(ModelSpec(args.model, dtype=args.dtype, device=args.device))
    rows = measure(loaded, tokens, args.rounds, args.least)
    make_folder(args.out.parent)
    cuda = loaded.device.type == "cuda"
    document = {
        "model": args.model if args.model.startswith("builtin:") else Path(args.model).name,
        "layers": loaded.decoder.num_layers,
        "hidden_size": loaded.decoder.hidden_size,
        "dtype": str(loaded.model.dtype),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "command": sys.argv[1:],
        "versions": versions(),
        "rows": rows,
    }
    write_json(args.out, document)
    print(f"{document['model']}, {document['layers']} layers, hidden {document['hidden_size']}, {document['device']}")
    show(rows, tokens)
    print(f"raw samples: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
