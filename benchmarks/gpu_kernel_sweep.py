"""The free choices of the entropy and probe kernels, one variant at a time: checked against the torch twins, then timed.

    python benchmarks/gpu_kernel_sweep.py [--only few many probe] [--out FILE.json]

Every section runs in a process of its own, so that a variant that faults or hangs costs only itself: the section goes on with
the next one. Times are microseconds in a replayed graph over cold buffers (gpu_timing.py); shares are of this run's copy.
"""

from __future__ import annotations

import argparse
import json
import queue
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "gpu"), str(ROOT / "benchmarks")]

import gpu_kernels  # noqa: E402
import test_kernels_gpu as known  # noqa: E402
from cases import DTYPES, Probe, captured  # noqa: E402
from gpu_kernels import HIDDEN, RANK, VOCAB  # noqa: E402
from gpu_timing import Bench, buffers, each  # noqa: E402

from sedac_cli.gpu import compile, entropy, probe  # noqa: E402
from sedac_cli.gpu.entropy import Form, fused_entropy, fused_entropy_decision  # noqa: E402
from sedac_cli.gpu.probe import ProbeWeights, TileShape, probe_risk  # noqa: E402

Settings = dict[tuple[Any, str], Any]
HALVES = DTYPES[1:]


# What is tried -------------------------------------------------------------------------------------------------------


def few_variants() -> dict[str, Settings]:
    """Blocks per chunk: loads of a thread at once x blocks per multiprocessor, smallest chunk."""
    found: dict[str, Settings] = {}
    for unroll, blocks, smallest in ((4, 4, 4096), (5, 4, 4096), (6, 4, 4096), (3, 5, 4096), (5, 4, 2048)):
        found[f"unroll {unroll}, {blocks} blocks, chunks from {smallest}"] = {
            (entropy, "FEW"): Form(unroll, blocks),
            (entropy, "MIN_CHUNK"): smallest,
        }
    early = {(entropy, "FEW"): Form(5, 4), (entropy, "EARLY"): True}
    return found | {"unroll 5, 4 blocks, chunks from 4096, early": early}


def many_variants() -> dict[str, Settings]:
    """Warps on chunks of their own: loads at once, blocks, stages in shared memory (0: in registers), chunks per warp."""
    plain = {"registers 4, 4 blocks": {(entropy, "MANY"): Form(4, 4)}}
    for unroll, blocks, stages in ((4, 4, 3), (2, 4, 6), (2, 4, 4), (4, 4, 2), (2, 4, 3), (4, 3, 4)):
        plain[f"ring {stages} x {unroll}, {blocks} blocks"] = {(entropy, "MANY"): Form(unroll, blocks, stages)}
    for unroll, blocks, stages, rounds in ((4, 4, 3, 2), (4, 4, 3, 4), (4, 4, 3, 8), (2, 4, 6, 4), (2, 4, 4, 4)):
        plain[f"ring {stages} x {unroll}, {blocks} blocks, {rounds} chunks a warp"] = {
            (entropy, "MANY"): Form(unroll, blocks, stages),
            (entropy, "cut_of"): in_rounds(rounds),
        }
    early = {(entropy, "MANY"): Form(4, 4, 3), (entropy, "EARLY"): True}
    return plain | {"ring 3 x 4, 4 blocks, early": early}


def in_rounds(rounds: int) -> Callable[..., entropy.Cut]:
    usual = entropy.cut_of

    def cut_of(rows: int, vocab: int, few: int, many: int, decision: bool = False) -> entropy.Cut:
        if rows * vocab < entropy.QUEUE_FROM:
            return usual(rows, vocab, few, many, decision)
        parts = min(max(1, rounds * many * entropy.WARPS // rows), -(-vocab // entropy.MIN_CHUNK))
        return entropy.cut(rows, vocab, 1, parts, many)

    return cut_of


def probe_variants() -> dict[str, Settings]:
    """Tiles: rows, blocks per tile, steps ahead, and how blocks multiply and meet."""
    mma = {"warpgroups": False, "cluster": True}
    wgmma = {"warpgroups": True, "cluster": True}
    shapes = {
        "128 rows x 4, wgmma, cluster": (128, 4, 6, wgmma),
        "128 rows x 4, wgmma, through memory": (128, 4, 6, wgmma | {"cluster": False}),
        "128 rows x 4, mma, cluster": (128, 4, 6, mma),
        "128 rows x 4, wgmma, cluster, no fence": (128, 4, 6, wgmma | {"fence": False}),
        "128 rows x 4, wgmma, cluster, 4 stages": (128, 4, 4, wgmma),
        "128 rows x 4, wgmma, cluster, 3 stages": (128, 4, 3, wgmma),
        "64 rows x 4, wgmma, cluster, 4 stages": (64, 4, 4, wgmma),
        "64 rows x 2, wgmma, cluster": (64, 2, 6, wgmma),
        "256 rows x 8, wgmma, cluster, 4 stages": (256, 8, 4, wgmma),
        "64 rows x 8, wgmma, cluster, 4 stages": (64, 8, 4, wgmma),
    }
    usual = probe.tile_shape
    found: dict[str, Settings] = {"as before": {(probe, "tile_shape"): lambda *given: usual(*given[:5])}}
    for label, (size, splits, stages, how) in shapes.items():
        found[label] = {(probe, "tile_shape"): tiled(size, splits, stages, how)}
    early = found["128 rows x 4, wgmma, cluster"] | {(probe, "EARLY"): True}
    return found | {"128 rows x 4, wgmma, cluster, early": early, "as chosen": {}}


def tiled(size: int, most: int, stages: int, how: dict[str, Any]) -> Callable[..., TileShape]:
    usual = probe.tile_shape

    def tile_shape(count: int, padded_rank: int, padded: int, parts: int, processors: int, hopper: bool) -> TileShape:
        if not hopper:
            return usual(count, padded_rank, padded, parts, processors)
        splits = most
        while splits > 1 and splits > padded // 64:
            splits //= 2
        return TileShape(size, splits, stages, **how)

    return tile_shape


# How it is checked and timed -----------------------------------------------------------------------------------------


def check_few() -> None:
    for dtype in DTYPES:
        known.test_entropy_of_special_rows(dtype)
        for rows, vocab in ((0, 1000), (1, 1001), (1, 151936), (3, 262143), (33, 50257)):
            known.test_entropy(dtype, vocab, rows)
        known.test_entropy_of_strided_and_unaligned_rows(dtype, 3, 5)
        for rows, vocab, width in ((1, 50257, 3584), (33, 1001, 77), (0, 1000, 8)):
            known.test_decision(dtype, dtype, rows, vocab, width)
    known.test_decision_batched_strided_and_from_device_numbers()
    known.test_decision_replays_with_a_new_threshold()
    known.test_entropy_replays()


def check_many() -> None:
    for dtype in DTYPES:
        special = known.logits_of(600, 32003, dtype)
        special[1::50, ::2] = -known.INF
        special[2], special[5], special[6] = -known.INF, 1.0, torch.finfo(dtype).min
        special[3, 31000], special[4, 17] = known.NAN, known.INF
        known.check_entropy(special, "special rows")
        known.test_entropy_of_strided_and_unaligned_rows(dtype, 3, 700)
        for rows, vocab in ((2100, 4099), (150, 131073), (1024, 32001), (5000, 3)):
            known.check_entropy(known.logits_of(rows, vocab, dtype), f"{rows} x {vocab}")
        for rows, vocab, width in ((2100, 1003, 64), (600, 32001, 3584), (600, 32008, 77)):
            known.test_decision(dtype, dtype, rows, vocab, width)


def check_probe() -> None:
    for dtype in HALVES:
        for rows in (9, 31, 257, 1025, 4096):
            known.test_probe(dtype, rows, 3584, 64, "split")
        known.test_probe(dtype, 600, 200, 10, "split")
        known.test_probe_of_strided_rows_and_nan(dtype)
        known.test_probe(dtype, 600, 896, 256, "split")
    known.test_probe(torch.bfloat16, 4000, 3584, 64, "plain")
    known.test_probe_flag_when_all_or_none_are_left()


def same_every_time(work: Callable[[], Any], result: Callable[[Any], torch.Tensor]) -> None:
    """Replays back to back must agree to the bit: sums have a fixed order, so a difference is a race."""
    graph, out = captured(lambda: [work() for _ in range(4)])
    graph.replay()
    torch.cuda.synchronize()
    first = [result(one).clone() for one in out]
    for _ in range(25):
        for _ in range(4):
            graph.replay()
        torch.cuda.synchronize()
        for one, before in zip(out, first, strict=True):
            assert torch.equal(result(one), before), "two replays differ"
    assert all(torch.equal(one, first[0]) for one in first), "two calls of a graph differ"


def decide(logits: torch.Tensor, states: list[torch.Tensor]) -> Any:
    return fused_entropy_decision(logits, *states, 5.0, 1.5, 0.5, 0.3)


class Entropies:
    """Microseconds of entropy and decision; a row of the table is `rows: us (share) decision/entropy`."""

    def __init__(self, counts: tuple[int, ...], check: Callable[[], None], target: str):
        self.check, self.target = check, target
        self.logits = {rows: buffers((rows, VOCAB), 3.0, 64) for rows in counts}
        self.states = {rows: list(torch.randn(2, rows, HIDDEN, device="cuda").bfloat16()) for rows in counts}

    def checked(self) -> None:
        self.check()
        rows = max(rows for rows in self.logits if rows <= 1024)
        logits, states = self.logits[rows][0], self.states[rows]
        same_every_time(lambda: fused_entropy(logits), lambda found: found.entropy)
        same_every_time(lambda: decide(logits, states), lambda found: found.load)

    def timed(self, bench: Bench) -> tuple[str, dict[str, list[float]]]:
        texts, samples = [], {}
        for rows, logits in self.logits.items():
            states = self.states[rows]
            both_states = [states] * len(logits)
            works = {"entropy": each(fused_entropy, logits), "decision": each(decide, logits, both_states)}
            taken = bench.measure(works)
            alone, both = (statistics.median(taken[name]) for name in ("entropy", "decision"))
            share = bench.floor(rows * VOCAB * 2) / alone
            texts.append(f"{rows}: {alone:.1f} ({share:.0%}) x{both / alone:.2f}")
            samples |= {f"{name} {rows}": values for name, values in taken.items()}
        return "  ".join(texts), samples


class Probes:
    """Microseconds of `probe_risk` with hi + lo weights, in times of reading the states once; `p`: weights rounded."""

    target = "4096: <= 2.00x"

    def __init__(self) -> None:
        self.inputs = {rows: buffers((rows, HIDDEN)) for rows in (1024, 2048, 4096, 8192)}
        self.weights = ProbeWeights.pack(Probe(HIDDEN, RANK).cuda(), "cuda")
        self.weights.half(torch.bfloat16)
        self.needs = torch.zeros(1, dtype=torch.int32, device="cuda")
        self.latched = torch.zeros(8192, dtype=torch.bool, device="cuda")

    def ours(self, x: torch.Tensor, precision: Any = "split") -> torch.Tensor:
        latched = self.latched[: x.shape[0]]
        return probe_risk(x, self.weights, threshold=0.5, latched=latched, needs=self.needs, precision=precision)

    def checked(self) -> None:
        check_probe()
        same_every_time(lambda: self.ours(self.inputs[4096][0]), lambda risk: risk)

    def timed(self, bench: Bench) -> tuple[str, dict[str, list[float]]]:
        texts, samples = [], {}
        for rows, inputs in self.inputs.items():
            works = {"split": each(self.ours, inputs)}
            if rows == 4096:
                works["plain"] = [lambda x=x: self.ours(x, "plain") for x in inputs]
            taken = bench.measure(works)
            floor = bench.floor(rows * HIDDEN * 2)
            middle = {name: statistics.median(values) for name, values in taken.items()}
            plain = f" p {middle['plain']:.1f}" if "plain" in middle else ""
            texts.append(f"{rows}: {middle['split']:.1f} ({middle['split'] / floor:.2f}x{plain})")
            samples |= {f"{name} {rows}": values for name, values in taken.items()}
        return "  ".join(texts), samples


SECTIONS: dict[str, tuple[Callable[[], dict[str, Settings]], Callable[[], Any]]] = {
    "few": (few_variants, lambda: Entropies((1, 8, 32, 64), check_few, "1..32: <= 12 us, decision <= x1.10")),
    "many": (many_variants, lambda: Entropies((256, 1024, 4096), check_many, "1024, 4096: >= 92 %, decision <= x1.10")),
    "probe": (probe_variants, Probes),
}


@contextmanager
def applied(settings: Settings) -> Iterator[None]:
    before = {key: getattr(*key) for key in settings}
    try:
        for (module, name), value in settings.items():
            setattr(module, name, value)
        yield
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)


def section(name: str, start: int, bandwidth: float, repeats: int) -> int:
    """In a process of its own: every variant from `start` on. Lines that begin with @ are for the parent."""
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    variants, make = SECTIONS[name]
    found, bench = make(), Bench(repeats, 1e9, bandwidth)
    if start == 0:
        print(f"\n== {name}: target {found.target}", flush=True)
    for index, (label, settings) in enumerate(variants().items()):
        if index < start:
            continue
        print(f"@at {index}", flush=True)
        with applied(settings):
            try:
                found.checked()
                torch.cuda.synchronize()
                left = any(bool(arena.any()) for arena in compile._arenas.values())
                verdict = "COUNTER LEFT" if left else "right"
                text, samples = found.timed(bench)
            except Exception as error:  # a fault of the device ends the process: the parent goes on behind it
                if isinstance(error, AssertionError | RuntimeError) and "CUDA" not in str(error):
                    print(f"  {label:44} WRONG: {str(error)[:300]}", flush=True)
                    continue
                traceback.print_exc()
                return 3
        print(f"  {label:44} {verdict}  {text}", flush=True)
        print("@" + json.dumps({"section": name, "variant": label, "verdict": verdict, "us": samples}), flush=True)
    return 0


def in_process(arguments: list[str], seconds: float, silence: float = 45.0) -> tuple[list[str], bool]:
    """Lines that begin with @, the others printed as they come; whether it ended well, in time, and never silent for long."""
    command = [sys.executable, __file__, *arguments]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def listen() -> None:
        assert child.stdout is not None
        for line in child.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=listen, daemon=True).start()
    until, told = time.monotonic() + seconds, []
    try:
        while (line := lines.get(timeout=max(0.1, min(silence, until - time.monotonic())))) is not None:
            if line.startswith("@"):
                told.append(line[1:].strip())
            else:
                print(line, end="", flush=True)
    except queue.Empty:
        print("  killed: no line in time", flush=True)
        child.kill()
    return told, child.wait() == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--out", type=Path, default=Path("gpu_kernel_sweep.json"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=230.0, help="for everything; what does not fit is left out")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--bandwidth", type=float, default=0.0, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.section == "copy":
        bench = Bench(3, 60)
        gpu_kernels.copy(bench)
        print(f"@{bench.bandwidth}")
        return 0
    if chosen.section:
        return section(chosen.section, chosen.start, chosen.bandwidth, chosen.repeats)
    began = time.monotonic()
    lines, fine = in_process(["--section", "copy"], 60)
    if not fine or not lines:
        return 1
    bandwidth, results = float(lines[-1]), []
    for name in chosen.only:
        start, count = 0, len(SECTIONS[name][0]())
        while start < count and (left := chosen.seconds - (time.monotonic() - began)) > 15:
            given = ["--section", name, "--start", start, "--bandwidth", bandwidth, "--repeats", chosen.repeats]
            lines, fine = in_process([str(x) for x in given], left)
            at = [int(line.split()[1]) for line in lines if line.startswith("at ")]
            results += [json.loads(line) for line in lines if line.startswith("{")]
            if fine:
                break
            reached = at[-1] if at else start
            print(f"  {name}: variant {list(SECTIONS[name][0]())[reached]!r} ended the process", flush=True)
            start = reached + 1
        print(f"  ({time.monotonic() - began:.0f} s)", flush=True)
    chosen.out.write_text(json.dumps({"copy_gb_per_s": bandwidth, "variants": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
