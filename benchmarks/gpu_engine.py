"""The graph engine on a GPU, in the shape of a known model with RANDOM weights and forced skip rates: speed only.

    python benchmarks/gpu_engine.py --out benchmarks/results/gpu_engine.json [--shape qwen2.5-7b] [--batch 1,8,32] [--trace DIR]
    python benchmarks/gpu_engine.py --show FILE [--reads 4.48]      # what such a file says, on any machine

Floor of a case: the bytes it had to read (weights of what ran, keys and values) at the bandwidth of reading, measured in the
same run. Cases are interleaved round by round, in an order drawn anew. Between any two of them the ungated step is timed, and a case is
set against the one before and the one after it: a card at its power limit changes its pace within a second, and what ran before decides
how far. Every sample is kept. Learned gates have routers whose outcome is known, everything on or every fourth layer off, without
stand-ins and with some of rank 192: what deciding and standing in cost. Above 8 sequences cuBLAS runs beside our linear kernels.
Where `nvidia-ml-py` is installed, each sample has the clock it ran at, and whether the card was at its power limit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
from kernel_sources import fingerprint  # noqa: E402

from sedac_cli.bench.floor import read_bandwidth  # noqa: E402
from sedac_cli.bench.machine import at_power_limit, of_nvml  # noqa: E402
from sedac_cli.gates.cascade import CascadeGate  # noqa: E402
from sedac_cli.gates.learned import LearnedGate, Router  # noqa: E402
from sedac_cli.gpu import skinny  # noqa: E402
from sedac_cli.probes import LREProbe  # noqa: E402
from sedac_cli.runtime.generate import GenerateOptions  # noqa: E402
from sedac_cli.runtime.graph import GraphEngine, fused  # noqa: E402
from sedac_cli.runtime.graph.ops import WideOps  # noqa: E402
from sedac_cli.runtime.plan import Plan, make_plan  # noqa: E402
from sedac_cli.shapes import shaped_model  # noqa: E402
from sedac_cli.standins import ZeroStandIn  # noqa: E402
from sedac_cli.standins.lowrank import LowRank, LowRankStandIns  # noqa: E402

PLACES, RANK = 1024, 192


def weight_bytes(loaded) -> tuple[int, list[int]]:
    """(what every step reads, what each layer's MLP reads)."""
    mlps = [sum(p.numel() * p.element_size() for p in b.entry.parameters()) for b in loaded.decoder.branches]
    layers = sum(p.numel() * p.element_size() for layer in loaded.decoder.layers for p in layer.parameters())
    head = loaded.model.get_output_embeddings().weight
    return layers - sum(mlps) + head.numel() * head.element_size(), mlps


def pace() -> tuple[int, bool] | None:
    """The clock in MHz at this moment, and whether the card's power limit holds it there."""
    return of_nvml(
        torch.device("cuda"),
        lambda nvml, gpu: (nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM), at_power_limit(nvml, gpu)),
    )


class Case:
    """An engine with one captured burst. `flags`: what it is forced to; `on`: the layers whose MLP runs, if not all."""

    def __init__(
        self, name: str, engine: GraphEngine, flags: list[int] | None, context: int, on: list[int] | None = None
    ):
        self.name, self.engine, self.flags, self.context = name, engine, flags, context
        self.on = flags or on or [1] * engine.program.num_layers
        self.samples: list[float] = []
        self.beside: list[tuple[float, float]] = []
        """The ungated step's times before and after each sample."""
        self.paces: list[tuple[int, bool]] = []

    def prepare(self) -> None:
        engine = self.engine
        ids = torch.randint(10, 1000, (engine.batch, self.context), device="cuda")
        options = GenerateOptions(max_new_tokens=engine.burst + 1, ignore_eos=True)
        engine.run(ids, torch.ones_like(ids), options)
        (self.replay, _), *_ = [value for (_, size), value in engine.graphs.items() if size == engine.burst]

    def time(self) -> None:
        engine = self.engine
        engine.state.slot.fill_(self.context)
        engine.state.position.fill_(self.context)
        if self.flags is not None:
            engine.program.needs.copy_(torch.tensor(self.flags))
        self.replay()
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(4):
            self.replay()
        end.record()
        if found := pace():  # while it runs
            self.paces.append(found)
        end.synchronize()
        self.samples.append(begin.elapsed_time(end) / 4 / engine.burst)

    @property
    def ms(self) -> float:
        return statistics.median(self.samples)

    @property
    def ratios(self) -> list[float]:
        return [own / statistics.mean(pair) for own, pair in zip(self.samples, self.beside, strict=False)]


def flags_with(layers: int, share: int) -> list[int]:
    """Flags with a share off, evenly: every fourth, every second layer."""
    return [0 if (i + 1) * share // 100 > i * share // 100 else 1 for i in range(layers)]


def learned(loaded, share: int, stands_in: bool) -> Plan:
    layers, width = loaded.decoder.num_layers, loaded.decoder.hidden_size
    routers = {i: Router(width, 16).requires_grad_(False) for i in range(layers)}
    for router, on in zip(routers.values(), flags_with(layers, share), strict=True):
        router.bias.fill_(-1.0 if on else 1.0)
    pairs = {i: LowRank(width, RANK).requires_grad_(False) for i in range(layers)} if stands_in else {}
    return Plan(LearnedGate(layers, routers, 0.0), LowRankStandIns(pairs) if pairs else ZeroStandIn())


def deciding(loaded) -> dict[str, tuple[Plan, list[int]]]:
    """By name, with the layers that stay on."""
    layers, width = loaded.decoder.num_layers, loaded.decoder.hidden_size
    probes = {i: LREProbe(width, 64).requires_grad_(False) for i in (layers // 4, layers // 2, 3 * layers // 4)}
    cascade = Plan(CascadeGate(layers, probes, dict.fromkeys(probes, 0.0)), ZeroStandIn())
    found = {"cascade deciding, all on": (cascade, flags_with(layers, 0))}
    for share, stands_in in ((0, False), (0, True), (25, False), (25, True)):
        name = (
            f"learned gate{' with stand-ins' if stands_in else ''} deciding, {f'{share} % off' if share else 'all on'}"
        )
        found[name] = learned(loaded, share, stands_in), flags_with(layers, share)
    return found


@contextlib.contextmanager
def by_cublas() -> Iterator[None]:
    """An engine made in here leaves matrices to cuBLAS."""
    kept, fused.make_ops = fused.make_ops, lambda *_: WideOps()
    try:
        yield
    finally:
        fused.make_ops = kept


def measure(loaded, batch: int, rounds: int, bandwidth: float, context: int) -> list[dict]:
    layers = loaded.decoder.num_layers
    dense = make_plan("never", loaded.decoder)
    plain = GraphEngine(loaded, dense, batch=batch, max_length=PLACES)
    forced = GraphEngine(loaded, dense, batch=batch, max_length=PLACES, forced=True)
    rest, mlps = weight_bytes(loaded)
    keys = sum(2 * k[0, :, 0].numel() * k.element_size() * batch * (context + 1) for k, _ in plain.cache.layers)
    cases = [Case("ungated", plain, None, context)]
    for share in (0, 25, 50, 100):
        cases.append(Case(f"{share} % of MLPs off", forced, flags_with(layers, share), context))
    for name, (plan, on) in deciding(loaded).items():
        engine = GraphEngine(loaded, plan, batch=batch, max_length=PLACES)
        cases.append(Case(name, engine, None, context, on))
    if batch > skinny.FEW_ROWS:
        with by_cublas():
            plain = GraphEngine(loaded, dense, batch=batch, max_length=PLACES)
            forced = GraphEngine(loaded, dense, batch=batch, max_length=PLACES, forced=True)
        cases.append(Case("cuBLAS, ungated", plain, None, context))
        for share in (0, 25):
            cases.append(Case(f"cuBLAS and nodes, {share} % of MLPs off", forced, flags_with(layers, share), context))
    for case in cases:
        case.prepare()
    ungated, *others = cases
    drawn = random.Random(batch)
    for _ in range(rounds):
        ungated.time()
        for case in drawn.sample(others, len(others)):
            case.time()
            ungated.time()
            case.beside.append((ungated.samples[-2], ungated.samples[-1]))
    lines = []
    for case in cases:
        read = rest + keys + sum(size for size, on in zip(mlps, case.on, strict=True) if on)
        floor = read / bandwidth * 1e3
        ratio = statistics.median(case.ratios or [1.0])
        lines.append(
            {
                "batch": batch, "case": case.name, "path": case.engine.path, "step_ms": case.ms, "floor_ms": floor,
                "over_floor": case.ms / floor, "against_ungated": ratio, "ratios": case.ratios, "samples_ms": case.samples,
                "ungated_beside_ms": case.beside,
                "tokens_per_s": batch / case.ms * 1e3, "clock_mhz": [clock for clock, _ in case.paces],
                "at_power_limit": [limited for _, limited in case.paces],
            }
        )  # fmt: skip
        print(told(lines[-1]), flush=True)
    return lines


def told(line: dict, floor_factor: float = 1.0) -> str:
    samples, ratios, clocks = line["samples_ms"], line["ratios"] or [1.0], line["clock_mhz"]
    step, floor, ratio = line["step_ms"], line["floor_ms"] * floor_factor, line["against_ungated"]
    clock = f", {statistics.median(clocks):.0f} MHz" if clocks else ""
    return (
        f"  batch {line['batch']:3} {line['case']:44} {step:7.3f} ms [{min(samples):.3f}..{max(samples):.3f}]  floor {floor:6.3f}  "
        f"{step / floor:5.2f}x floor  {ratio:6.3f} of ungated, {1 / ratio:.2f}x [{min(ratios):.3f}..{max(ratios):.3f}]{clock}"
    )


def show(path: Path, reads: float | None) -> None:
    """`reads`: TB/s to take floors at, instead of what the file's run read with."""
    facts = json.loads(path.read_text())
    own = facts["read_bytes_per_s"] / 1e12
    same = "as here" if facts["kernels"] == fingerprint() else "others than here"
    print(f"{facts['command']}\n{facts['what']}; {facts['gpu']}, torch {facts['torch']}; kernels: {same}")
    print(f"it read with {own:.2f} TB/s; floors at {reads or own:.2f}")
    for line in facts["cases"]:
        print(told(line, own / (reads or own)))
    for batch in dict.fromkeys(line["batch"] for line in facts["cases"]):
        lines = [line for line in facts["cases"] if line["batch"] == batch]
        limited, clocks = ([x for line in lines for x in line[key]] for key in ("at_power_limit", "clock_mhz"))
        if clocks:
            print(
                f"  batch {batch:3} at its power limit in {sum(limited)} of {len(limited)} samples, {min(clocks)} to {max(clocks)} MHz"
            )
    print(f"  host calls while 3 bursts ran: {facts.get('host_calls_in_3_bursts', 'not traced')}")


def trace(loaded, folder: Path) -> dict:
    """What the host does while three bursts run, by the profiler: launches of graphs, and anything that waits."""
    plan = learned(loaded, 0, False)
    case = Case("traced", GraphEngine(loaded, plan, batch=1, max_length=PLACES), None, 64)
    case.prepare()
    case.time()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(3):
            case.replay()
        torch.cuda.synchronize()
    calls: dict[str, int] = {}
    for event in profiler.events():
        if event.name.startswith("cuda") or event.name.startswith("cu"):
            calls[event.name] = calls.get(event.name, 0) + 1
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / "engine_trace.json"))
    return calls


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_engine.json")
    parser.add_argument("--shape", default="qwen2.5-7b")
    parser.add_argument("--batch", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--show", type=Path, metavar="FILE", help="print what such a file says; needs no GPU")
    parser.add_argument(
        "--reads", type=float, metavar="TB/S", help="with --show: floors at this bandwidth instead of the file's"
    )
    chosen = parser.parse_args()
    if chosen.show:
        show(chosen.show, chosen.reads)
        return 0
    torch.set_grad_enabled(False)
    began = time.monotonic()
    bandwidth = read_bandwidth(torch.device("cuda"))
    loaded = shaped_model(chosen.shape, "cuda")
    print(
        f"{chosen.shape}, RANDOM weights, bf16; reading {bandwidth / 1e12:.2f} TB/s; {time.monotonic() - began:.0f} s",
        flush=True,
    )
    facts = {
        "what": f"shape of {chosen.shape}, random weights: speed only", "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__, "read_bytes_per_s": bandwidth, "context": chosen.context, "command": " ".join(sys.argv),
        "kernels": fingerprint(),
        "cases": [],
    }  # fmt: skip
    for batch in map(int, chosen.batch.split(",")):
        facts["cases"] += measure(loaded, batch, chosen.rounds, bandwidth, chosen.context)
        torch.cuda.empty_cache()
    if chosen.trace:
        facts["host_calls_in_3_bursts"] = trace(loaded, chosen.trace)
        print(f"  host calls while 3 bursts ran: {facts['host_calls_in_3_bursts']}")
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(facts, indent=1))
    print(f"raw samples in {chosen.out}; {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
