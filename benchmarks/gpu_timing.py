"""Timing kernels fairly: captured calls over buffers larger than L2, variants interleaved, every sample kept.

Needs tests/gpu on the import path, for the capture helper the tests use.

    bench = Bench(repeats=5, seconds=175)
    samples = bench.measure({"ours": each(fused_entropy, buffers((32, 151936)))})
"""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from cases import captured

BEGAN = time.monotonic()
ROTATE = 160 * 2**20
"""Bytes the buffers of one variant span, so that no call finds its input in L2 (50 to 60 MB)."""
Work = Callable[[], object]


@dataclass
class Line:
    name: str
    samples: dict[str, list[float]]
    floor: float | None
    target: str
    reached: bool | None


@dataclass
class Bench:
    repeats: int
    seconds: float
    bandwidth: float = float("nan")
    read_bandwidth: float = float("nan")
    lines: list[Line] = field(default_factory=list)

    def left(self) -> float:
        return self.seconds - (time.monotonic() - BEGAN)

    def floor(self, size: int) -> float:
        """Microseconds to move `size` bytes."""
        return size / self.bandwidth / 1e3

    def read_floor(self, size: int) -> float:
        """Microseconds to read `size` bytes."""
        return size / self.read_bandwidth / 1e3

    def measure(self, variants: dict[str, Sequence[Work]], calls: int = 1) -> dict[str, list[float]]:
        """Microseconds per call and variant, one per repeat. A variant is the same call on different buffers; a graph holds
        at least eight calls, so that the gap between two replays does not count."""
        graphs = {}
        for name, works in variants.items():
            if name.startswith("compile") and self.left() < 30:
                continue
            try:
                graphs[name] = recorded(works, max(calls, -(-8 // len(works))))
            except Exception:
                print(f"    variant {name} failed:")
                traceback.print_exc(limit=3)
                torch.cuda.synchronize()
        samples: dict[str, list[float]] = {name: [] for name in graphs}
        for repeat in range(self.repeats + 1):
            for name, (graph, count) in graphs.items():
                taken = timed(graph, 3) / count
                if repeat:  # the first round warms up
                    samples[name].append(taken)
        return samples

    def report(self, name: str, samples: dict[str, list[float]], floor: float | None, target: str, judge) -> None:
        ours = statistics.median(samples["ours"]) if samples.get("ours") else None
        reached = None if ours is None or judge is None else bool(judge(ours))
        self.lines.append(Line(name, samples, floor, target, reached))
        texts = [f"{key} {statistics.median(x):.1f} [{min(x):.1f}..{max(x):.1f}]" for key, x in samples.items() if x]
        print(f"  {name}: " + ", ".join(texts) + (f"; floor {floor:.1f}" if floor else ""), flush=True)


def recorded(works: Sequence[Work], calls: int) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of every work `calls` times, and how many calls that is."""
    for work in works[:2]:
        work()
    graph, _ = captured(lambda: [work() for _ in range(calls) for work in works] and None)
    graph.replay()
    torch.cuda.synchronize()
    return graph, calls * len(works)


def timed(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """Microseconds per replay."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(400_000)  # the replays are queued while the device is busy, so their launches cost nothing
    begin.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / replays


def launched(work: Work, calls: int = 4) -> float:
    """Microseconds per call, launched one after the other without a graph: for work far longer than a launch."""
    work()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / calls


def buffers(shape: tuple[int, ...], scale: float = 1.0, most: int = 256) -> list[torch.Tensor]:
    """Random bf16 tensors that together exceed L2."""
    size = 2
    for extent in shape:
        size *= extent
    count = max(1, min(most, -(-ROTATE // size)))
    return [(torch.randn(shape, device="cuda") * scale).to(torch.bfloat16) for _ in range(count)]


def each(work: Callable[..., object], *lists: Sequence[object]) -> list[Work]:
    return [lambda arguments=arguments: work(*arguments) for arguments in zip(*lists, strict=True)]


def table(lines: Sequence[Line]) -> None:
    print(f"\n{'':34} {'us':>8} {'floor':>8} {'share':>6}  {'eager':>8} {'compile':>8}  target")
    for line in lines:
        middle = {name: statistics.median(samples) for name, samples in line.samples.items() if samples}
        ours = middle.get("ours")
        if ours is None:
            continue
        cells = [f"{middle[name]:8.1f}" if name in middle else " " * 8 for name in ("eager", "compile")]
        floor = f"{line.floor:8.1f} {line.floor / ours:6.0%}" if line.floor else " " * 15
        verdict = {True: "reached", False: "MISSED", None: ""}[line.reached]
        print(f"{line.name:34} {ours:8.1f} {floor}  {' '.join(cells)}  {line.target} {verdict}".rstrip())
