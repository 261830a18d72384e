"""Every kernel on this GPU: right first, then fast, against its floor and against torch eager and torch.compile.

    python benchmarks/gpu_kernels.py --out gpu_kernels.json
    python benchmarks/gpu_kernels.py --show benchmarks/results/gpu_kernels.json        # its tables again, on any machine

Times are per call inside a replayed CUDA graph, over buffers that together exceed L2, variants interleaved, median of the
repeats. A floor is the bytes that must move over the fastest copy measured here. Sections that fail print why; the rest runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "gpu"), str(ROOT / "benchmarks")]

from cases import Probe, router_of  # noqa: E402
from gpu_timing import BEGAN, ROTATE, Bench, Line, buffers, each, launched, table, timed  # noqa: E402
from kernel_sources import fingerprint  # noqa: E402

from sedac_cli.gpu import compile, reference  # noqa: E402
from sedac_cli.gpu.conditional import ConditionalGraph  # noqa: E402
from sedac_cli.gpu.entropy import fused_entropy, fused_entropy_decision, linear_entropy  # noqa: E402
from sedac_cli.gpu.probe import ProbeWeights, RouterWeights, probe_risk, router_score  # noqa: E402
from sedac_cli.gpu.route import gather_rows, route_merge, route_split, scatter_rows  # noqa: E402

VOCAB, HIDDEN, RANK = 151936, 3584, 64


# Sections ------------------------------------------------------------------------------------------------------------


def tests(bench: Bench) -> None:
    """The GPU tests in a process of their own: a kernel that faults must not end the measuring."""
    files = [f"tests/gpu/test_{name}_gpu.py" for name in ("conditional", "kernels", "packed")]
    options = ["-q", "-m", "gpu", "--tb=short", "-p", "no:cacheprovider", "--maxfail=25"]
    command = [sys.executable, "-m", "pytest", *files, *options]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(30.0, bench.left() - 60))
        print("\n".join(done.stdout.splitlines()[-120:]) + done.stderr[-2000:], flush=True)
        print(f"  tests {'PASSED' if done.returncode == 0 else 'FAILED'}", flush=True)
    except subprocess.TimeoutExpired as error:
        seen = error.stdout or ""
        seen = seen if isinstance(seen, str) else seen.decode(errors="replace")
        print(f"  tests did not end in {error.timeout:.0f} s; so far:\n{seen[-3000:]}", flush=True)


def copy(bench: Bench) -> None:
    """The ceilings. A copy captured into a graph becomes a memcpy node, which may run at two thirds of what a kernel reaches
    (2775 against 4160 GB/s on an H200): so several ways to move 2 GiB, eager and captured, and the fastest one counts."""
    x = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    y = torch.empty_like(x)
    words, to = x.view(torch.int32), y.view(torch.int32)
    ways = {
        "copy_": lambda: y.copy_(x),
        "copy_ of half": lambda: y[: 2**30].copy_(x[: 2**30]),
        "bitwise_not int32": lambda: torch.bitwise_not(words, out=to),
        "add int64": lambda: torch.add(x.view(torch.int64), 1, out=y.view(torch.int64)),
    }
    sizes = {name: 2 * x.numel() // (2 if "half" in name else 1) for name in ways}
    samples = {f"{name}, captured": taken for name, taken in bench.measure({n: [w] for n, w in ways.items()}).items()}
    samples |= {f"{name}, eager": [launched(way) for _ in range(bench.repeats)] for name, way in ways.items()}
    speeds = {name: sizes[name.rpartition(", ")[0]] / min(taken) / 1e3 for name, taken in samples.items()}
    best = max(speeds, key=lambda name: speeds[name])
    bench.bandwidth = speeds[best]
    reads = {
        "amax int32": lambda: words.amax(),
        "amax int64": lambda: x.view(torch.int64).amax(),
        "sum float32": lambda: x.view(torch.float32).sum(),
    }
    read = {name: [launched(way, 16) for _ in range(bench.repeats)] for name, way in reads.items()}
    bench.read_bandwidth = max(x.numel() / min(taken) / 1e3 for taken in read.values())
    bench.report("copy 2 GiB", {"ours": samples[best]} | samples | read, None, "", None)
    print("  " + ", ".join(f"{name} {speed:.0f}" for name, speed in speeds.items()) + " GB/s", flush=True)
    print(f"  copy {bench.bandwidth:.0f} GB/s ({best}), read alone {bench.read_bandwidth:.0f} GB/s", flush=True)


def entropies(bench: Bench) -> None:
    fast = torch.compile(reference.entropy_of_logits, dynamic=False)
    for rows in (1, 8, 32, 256, 1024, 4096):
        inputs = buffers((rows, VOCAB), 3.0)
        variants = {"ours": each(fused_entropy, inputs), "eager": each(reference.entropy_of_logits, inputs[:8])}
        if rows in (32, 1024):
            variants["compile"] = each(fast, inputs[:8])
        floor = bench.floor(rows * VOCAB * 2)
        if rows <= 32:
            target, judge = "<= 12 us", lambda t: t <= 12.0
        else:
            target, judge = ">= 92 % of copy", lambda t, floor=floor: floor / t >= 0.92
        bench.report(
            f"entropy {rows} x {VOCAB}", bench.measure(variants), floor, target, judge if rows != 256 else None
        )


def heads(bench: Bench) -> None:
    """Entropies of hidden states: the head's product and its logits, a chunk of rows at a time."""
    head = torch.nn.Linear(HIDDEN, VOCAB, bias=False, device="cuda", dtype=torch.bfloat16)
    for rows in (32, 4096):
        hidden = torch.randn(rows, HIDDEN, device="cuda", dtype=torch.bfloat16)
        ways = {"ours": linear_entropy, "eager": reference.linear_entropy}
        variants = {name: [lambda way=way, hidden=hidden: way(hidden, head, VOCAB)] for name, way in ways.items()}
        variants["product alone"] = [lambda hidden=hidden: head(hidden)]
        with torch.no_grad():
            bench.report(f"head and entropy {rows} x {VOCAB}", bench.measure(variants), None, "", None)


V9 = {32: 19.0, 256: 218.0, 1024: 775.0, 4096: 3270.0}
"""What an earlier kernel's own page says it took, in microseconds by rows; it does not say in which vocabulary."""


def decisions(bench: Bench) -> None:
    def prepared(rows: int, vocab: int):
        """(buffers of logits, the decision on one of them, its floor)"""
        states = [torch.randn(rows, HIDDEN, device="cuda", dtype=torch.bfloat16) for _ in range(2)]

        def decide(x):
            return fused_entropy_decision(x, *states, 5.0, 1.5, 0.5, 0.3)

        return buffers((rows, vocab), 3.0), decide, bench.floor(rows * (vocab + 2 * HIDDEN) * 2)

    for rows, vocab in ((256, 32000), (1024, 32000), (4096, 32000), (256, VOCAB)):
        logits, decide, floor = prepared(rows, vocab)
        samples, limit = bench.measure({"ours": each(decide, logits)}), V9[rows] / 5
        bench.report(f"decision {rows} x {vocab}", samples, floor, "V9 / 5", lambda t, limit=limit: t <= limit)
    for rows in (1, 32, 1024, 4096):
        logits, decide, floor = prepared(rows, VOCAB)
        samples = bench.measure({"ours": each(decide, logits), "entropy": each(fused_entropy, logits)})
        limit = 1.1 * statistics.median(samples["entropy"])
        bench.report(
            f"decision {rows} x {VOCAB}", samples, floor, "<= 1.1 x entropy", lambda t, limit=limit: t <= limit
        )


def probes(bench: Bench) -> None:
    plain = Probe(HIDDEN, RANK).cuda()
    weights = ProbeWeights.pack(plain, "cuda")
    weights.half(torch.bfloat16)
    many = [ProbeWeights.pack(Probe(HIDDEN, RANK).cuda(), "cuda") for _ in range(-(-ROTATE // (HIDDEN * RANK * 4)))]
    one = torch.randn(1, HIDDEN, device="cuda", dtype=torch.bfloat16)
    latched, needs = (
        torch.zeros(4096, dtype=torch.bool, device="cuda"),
        torch.zeros(1, dtype=torch.int32, device="cuda"),
    )

    def ours(x, w=weights, precision="split"):
        return probe_risk(x, w, threshold=0.5, latched=latched[: x.shape[0]], needs=needs, precision=precision)

    def twin(x):
        return reference.probe_risk(x, plain, threshold=0.5, latched=latched[: x.shape[0]], needs=needs)

    floor = bench.floor(HIDDEN * RANK * 4)
    samples = bench.measure({"ours": [lambda: ours(one)], "eager": [lambda: twin(one)]}, calls=64)
    bench.report("probe 1 row, weight in L2", samples, None, "<= 6 us", lambda t: t <= 6.0)
    samples = bench.measure({"ours": [lambda w=w: ours(one, w) for w in many]})
    bench.report("probe 1 row, weight from memory", samples, floor, "<= 6 us", lambda t: t <= 6.0)
    fast = torch.compile(twin, dynamic=False)
    for rows in (8, 32, 256, 1024, 4096):
        inputs = buffers((rows, HIDDEN))
        variants = {
            "ours": each(ours, inputs),
            "plain": [lambda x=x: ours(x, precision="plain") for x in inputs],
            "eager": each(twin, inputs[:16]),
        }
        if rows == 4096:
            variants["compile"] = each(fast, inputs)
        floor = bench.floor(rows * HIDDEN * 2)
        target, judge = ("<= 2 x read", lambda t, floor=floor: t <= 2 * floor) if rows == 4096 else ("", None)
        bench.report(f"probe {rows} x {HIDDEN}", bench.measure(variants), floor, target, judge)
    inputs32 = [x.float() for x in buffers((4096, HIDDEN))[:3]]
    samples = bench.measure({"ours": each(ours, inputs32), "eager": each(twin, inputs32)})
    bench.report(f"probe 4096 x {HIDDEN} float32", samples, bench.floor(4096 * HIDDEN * 4), "", None)


def routers(bench: Bench) -> None:
    router = router_of(HIDDEN, 16, "cuda")
    weights = RouterWeights.pack(router, "cuda")
    needs = torch.zeros(1, dtype=torch.int32, device="cuda")
    for rows in (1, 32, 4096):
        inputs = buffers((rows, HIDDEN))
        variants = {
            "ours": each(lambda x: router_score(x, weights, needs=needs), inputs),
            "eager": each(lambda x: reference.router_score(x, router, needs=needs), inputs[:16]),
        }
        floor = bench.floor(rows * HIDDEN * 2)
        bench.report(f"router {rows} x {HIDDEN}", bench.measure(variants), floor, "", None)


def routing(bench: Bench) -> None:
    rows = 8192
    hidden = buffers((rows, HIDDEN))[:3]
    leaves = torch.rand(rows, device="cuda") < 0.5
    scale = torch.where(leaves, 0.0, 1.0)
    routed, packed = [route_split(x, leaves) for x in hidden], [gather_rows(x, scale) for x in hidden]
    out = torch.empty_like(hidden[0])
    whole, half = 2 * rows * HIDDEN * 2, rows * HIDDEN * 2
    cases = {
        "split": (
            [lambda x=x, r=r: route_split(x, leaves, r) for x, r in zip(hidden, routed, strict=True)],
            each(lambda x: reference.route_split(x, leaves), hidden), whole,
        ),
        "merge": (
            [lambda r=r: route_merge(r.active, r.exit, r.slot, out) for r in routed],
            [lambda r=r: reference.route_merge(r.active, r.exit, r.slot) for r in routed], whole,
        ),
        "gather": (
            [lambda x=x, p=p: gather_rows(x, scale, p) for x, p in zip(hidden, packed, strict=True)],
            each(lambda x: reference.gather_rows(x, scale), hidden), half,
        ),
        "scatter": (
            [lambda p=p: scatter_rows(p.rows, p.slot, out) for p in packed],
            [lambda p=p: reference.scatter_rows(p.rows, p.slot) for p in packed], half + half // 2,
        ),
    }  # fmt: skip
    for name, (ours, eager, size) in cases.items():
        floor = bench.floor(size)
        samples = bench.measure({"ours": ours, "eager": eager})
        bench.report(
            f"{name} {rows} x {HIDDEN}", samples, floor, ">= 80 % of copy", lambda t, floor=floor: floor / t >= 0.8
        )
    same = [torch.empty_like(x) for x in hidden]
    samples = bench.measure({"ours": [lambda x=x, y=y: y.copy_(x) for x, y in zip(hidden, same, strict=True)]})
    bench.report(f"(a plain copy of {rows} x {HIDDEN})", samples, bench.floor(whole), "", None)


def conditionals(bench: Bench) -> None:
    count = 28
    nodes = ConditionalGraph()
    flags = torch.ones(count, dtype=torch.int32, device="cuda")
    y = torch.zeros(count, 64, device="cuda")
    nodes.warm(lambda: y[0].add_(1.0))
    torch.cuda.synchronize()

    def capture(kind: str) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="relaxed"):
            if kind == "plain":
                for i in range(count):
                    y[i].add_(1.0)
                return graph
            conditions = nodes.conditions(count, either=kind == "either")
            for _ in range(1 if kind != "armed 10 times" else 10):
                conditions.set(flags)
            for i in range(count):
                if kind == "either":
                    run, otherwise = conditions.branches(i)
                    with run:
                        y[i].add_(1.0)
                    with otherwise:
                        y[i].sub_(1.0)
                else:
                    with conditions.body(i):
                        y[i].add_(1.0)
        return graph

    graphs = {kind: capture(kind) for kind in ("plain", "if", "either", "armed 10 times")}
    for state in (1, 0):
        flags.fill_(state)
        samples = {
            "ours" if kind == "if" else kind: [timed(graph, 20) for _ in range(bench.repeats)]
            for kind, graph in graphs.items()
        }
        bench.report(f"{count} IF nodes, all {'on' if state else 'off'}", samples, None, "", None)
    once, ten = (statistics.median(samples[kind]) for kind in ("ours", "armed 10 times"))
    print(
        f"  one set_conditions of {count} nodes: {(ten - once) / 9:.2f} us; native else: {nodes.native_else}",
        flush=True,
    )


def ratios(lines: Sequence[Line], read_bandwidth: float) -> None:
    """What is not in the table's columns: beside the kernel's own part, beside V9, beside reading alone."""
    print()
    for line in lines:
        kind, *size = line.name.split()
        middle = {name: statistics.median(samples) for name, samples in line.samples.items() if samples}
        if "ours" not in middle:
            continue
        told = [
            f"{middle['ours'] / middle[name]:.3f}x {name}"
            for name in ("entropy", "product alone", "plain")
            if name in middle
        ]
        if kind == "entropy" and int(size[0]) >= 256:
            read = int(size[0]) * int(size[-1]) * 2 / read_bandwidth / 1e3
            told.append(f"{read / middle['ours']:.0%} of reading alone")
        if kind == "prefill":
            told.append(f"{middle['dense'] / middle['ours']:.2f}x as fast as dense")
        if "no MLPs" in middle:
            told.append(
                ", ".join(f"{name} {middle[name] / int(kind):.1f} us a layer" for name in ("all off", "no MLPs"))
            )
        if kind == "decision" and int(size[0]) in V9:
            told.append(f"{V9[int(size[0])] / middle['ours']:.1f}x as fast as V9's {V9[int(size[0])]:.0f} us")
        if line.name == f"probe 4096 x {HIDDEN}":
            read = 4096 * HIDDEN * 2 / read_bandwidth / 1e3
            told += [
                f"{middle['ours'] / line.floor:.3f}x a copy's time for these bytes",
                f"{middle['ours'] / read:.3f}x reading alone",
            ]
        if told:
            print(f"{line.name:34} {', '.join(told)}")


def shown(path: Path) -> int:
    facts = json.loads(path.read_text())
    lines = [Line(**line) for line in facts["microseconds"]]
    kernels = facts.get("kernels")
    state = "not recorded" if kernels is None else "as here" if kernels == fingerprint() else "others than here"
    print(f"{facts['command']}\n{facts['machine']}; kernels: {state}")
    print(f"copy {facts['copy_gb_per_s']:.0f} GB/s, read alone {facts['read_gb_per_s']:.0f} GB/s")
    table(lines)
    ratios(lines, facts["read_gb_per_s"])
    return 0


SECTIONS = (copy, entropies, heads, decisions, probes, routers, routing, conditionals)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_kernels.json")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=175.0, help="what takes long is left out when this runs short")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--only", action="append", choices=[section.__name__ for section in SECTIONS])
    parser.add_argument("--show", type=Path, metavar="FILE", help="print the tables of such a file; needs no GPU")
    chosen = parser.parse_args()
    if chosen.show:
        return shown(chosen.show)
    cupy = compile.require_gpu()
    machine = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda, "cupy": cupy.__version__,
        "driver": cupy.cuda.runtime.driverGetVersion(), "nvrtc": ".".join(map(str, cupy.cuda.nvrtc.getVersion())),
    }  # fmt: skip
    print(machine, flush=True)
    bench = Bench(chosen.repeats, chosen.seconds)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    if not chosen.no_tests:
        print(f"\n== tests  {time.monotonic() - BEGAN:.0f} s", flush=True)
        tests(bench)
    failed = []
    for section in SECTIONS:
        if chosen.only and section.__name__ not in chosen.only and section is not copy:
            continue
        print(f"\n== {section.__name__}  {time.monotonic() - BEGAN:.0f} s", flush=True)
        try:
            section(bench)
        except Exception:
            failed.append(section.__name__)
            traceback.print_exc()
        torch.cuda.empty_cache()
    table(bench.lines)
    ratios(bench.lines, bench.read_bandwidth)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "command": " ".join(sys.argv),
        "kernels": fingerprint(),
        "machine": machine,
        "copy_gb_per_s": bench.bandwidth,
        "read_gb_per_s": bench.read_bandwidth,
        "microseconds": [asdict(line) for line in bench.lines],
    }
    chosen.out.write_text(json.dumps(facts, indent=1))
    print(
        f"raw samples in {chosen.out}; sections that failed: {', '.join(failed) or 'none'}; {time.monotonic() - BEGAN:.0f} s"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
