"""The decode kernels on a GPU, in the shapes of a Qwen2.5-7B step, against the time to read their weights.

    python benchmarks/gpu_decode.py --out benchmarks/results/gpu_decode.json [--no-tests] [--tuning]

Random weights: only speed is measured here. Every matrix is read from memory, not from L2: calls go round over copies.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "gpu")]
from gpu_kernels import copy  # noqa: E402
from gpu_timing import Bench, buffers, each, table  # noqa: E402

from sedac_cli.gpu import compile, skinny  # noqa: E402
from sedac_cli.gpu.decode import Heads, attend, attend_scratch, rms_norm, rotate_and_store  # noqa: E402
from sedac_cli.gpu.skinny import skinny_gated, skinny_linear  # noqa: E402

HIDDEN, WIDE, VOCAB = 3584, 18944, 152064
HEADS = Heads(28, 4, 128, 128, 128**-0.5)


def linears(bench: Bench, rows: int) -> None:
    for name, size, width in (
        ("qkv", 4608, HIDDEN),
        ("out", HIDDEN, HIDDEN),
        ("down", HIDDEN, WIDE),
        ("head", VOCAB, HIDDEN),
    ):
        weights = buffers((size, width), width**-0.5)
        x, h = buffers((rows, width))[0], buffers((rows, size))[0]
        samples = bench.measure(
            {
                "ours": each(lambda w, x=x, h=h: skinny_linear(x, [w], residual=h, out=h), weights),
                "eager": each(lambda w, x=x: torch.nn.functional.linear(x, w), weights),
            }
        )
        bench.report(f"{name} {rows} x {width} -> {size}", samples, bench.read_floor(size * width * 2), "", None)
    gate, up = (buffers((WIDE, HIDDEN), HIDDEN**-0.5) for _ in range(2))
    x = buffers((rows, HIDDEN))[0]
    flag = torch.zeros(1, dtype=torch.int32, device="cuda")
    out = torch.empty(rows, WIDE, dtype=x.dtype, device="cuda")

    def eager(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        linear = torch.nn.functional.linear
        return torch.nn.functional.silu(linear(x, g)) * linear(x, u)

    samples = bench.measure(
        {
            "ours": each(lambda g, u: skinny_gated(x, g, u, "silu", out=out), gate, up),
            "eager": each(eager, gate, up),
            "not needed": each(lambda g, u: skinny_gated(x, g, u, "silu", out=out, need=flag), gate, up),
        }
    )
    bench.report(f"gate, up {rows} x {HIDDEN} -> {WIDE}", samples, bench.read_floor(2 * WIDE * HIDDEN * 2), "", None)


def glue(bench: Bench, rows: int, places: int) -> None:
    states = buffers((rows, HIDDEN), most=8)
    weight = torch.ones(HIDDEN, dtype=torch.bfloat16, device="cuda")
    bench.report(
        f"norm {rows}", bench.measure({"ours": each(lambda x: rms_norm(x, weight, 1e-6), states)}), None, "", None
    )
    qkv = buffers((rows, HEADS.width), most=8)
    keys, values = (buffers((rows, HEADS.key, places, HEADS.size), most=56) for _ in range(2))
    count = min(len(keys), 8)
    cos = torch.ones(rows, HEADS.rotary, dtype=torch.bfloat16, device="cuda")
    slot = torch.tensor([places - 1], device="cuda")
    first = torch.zeros(rows, dtype=torch.long, device="cuda")
    scratch = attend_scratch(rows, HEADS, places, slot.device)
    works = each(
        lambda x, k, v: rotate_and_store(x, HEADS, cos, cos, k, v, slot), qkv[:count], keys[:count], values[:count]
    )
    bench.report(f"rotate {rows}", bench.measure({"ours": works}), None, "", None)
    works = each(lambda k, v: attend(qkv[0], HEADS, k, v, slot, first, scratch), keys, values)
    floor = bench.read_floor(2 * rows * HEADS.key * places * HEADS.size * 2)
    bench.report(f"attend {rows} x {places}", bench.measure({"ours": works}), floor, "", None)


def tuning(bench: Bench) -> None:
    for rows in (1, 32):
        for name, size, width in (("out", HIDDEN, HIDDEN), ("down", HIDDEN, WIDE), ("gate, up", WIDE, HIDDEN)):
            weights = buffers((size, width), width**-0.5)
            x = buffers((rows, width))[0]
            variants = {}
            for warps, stages in ((8, 8), (8, 4), (8, 12), (4, 8), (4, 16), (16, 4), (16, 8)):
                if name == "gate, up":
                    work = each(lambda w, x=x: skinny_gated(x, w, w, "silu"), weights)
                else:
                    work = each(lambda w, x=x: skinny_linear(x, [w]), weights)

                def tuned(call, warps=warps, stages=stages):
                    with patch.object(skinny, "WARPS", warps), patch.object(skinny, "STAGES", stages):
                        call()

                variants[f"{warps} warps, {stages} stages"] = [
                    lambda call=call, tuned=tuned: tuned(call) for call in work
                ]
            samples = bench.measure({"ours": next(iter(variants.values())), **variants})
            bench.report(f"tune {name} {rows}", samples, bench.read_floor(size * width * 2), "", None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_decode.json")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--tuning", action="store_true")
    chosen = parser.parse_args()
    cupy = compile.require_gpu()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    if not chosen.no_tests:
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "--maxfail=12"]
        done = subprocess.run([*command, "tests/gpu/test_decode_gpu.py"], cwd=ROOT, capture_output=True, text=True)
        print("\n".join(done.stdout.splitlines()[-100:]) + done.stderr[-1500:], flush=True)
    bench = Bench(chosen.repeats, 300)
    copy(bench)
    for rows in (1, 8, 32, 64):
        linears(bench, rows)
    for rows, places in ((1, 512), (1, 4096), (32, 512)):
        glue(bench, rows, places)
    if chosen.tuning:
        tuning(bench)
    table(bench)
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cupy": cupy.__version__}
    facts = {"machine": machine, "copy_gb_per_s": bench.bandwidth, "read_gb_per_s": bench.read_bandwidth}
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(facts | {"microseconds": [asdict(line) for line in bench.lines]}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
