"""The decode kernels on a GPU, in the shapes of a Qwen2.5-7B step, against the time to read their weights.

    python benchmarks/gpu_decode.py --out benchmarks/results/gpu_decode.json [--no-tests]

Random weights: only speed is measured here. Every matrix is read from memory, not from L2: calls go round over copies.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "gpu")]
from cases import router_of  # noqa: E402
from gpu_kernels import copy  # noqa: E402
from gpu_timing import Bench, buffers, each, table  # noqa: E402
from kernel_sources import fingerprint  # noqa: E402

from sedac_cli.gpu import compile  # noqa: E402
from sedac_cli.gpu.decode import (  # noqa: E402
    Heads,
    attend,
    attend_scratch,
    norm_route,
    norm_route_parts,
    norm_route_scratch,
    rms_norm,
)
from sedac_cli.gpu.packed import PackedMlp  # noqa: E402
from sedac_cli.gpu.probe import RouterWeights  # noqa: E402
from sedac_cli.gpu.skinny import PENDING, Other, skinny_gated, skinny_linear  # noqa: E402

HIDDEN, WIDE, VOCAB, RANK = 3584, 18944, 152064, 192
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
    router = [RouterWeights.pack(router_of(HIDDEN, 16, "cuda"), "cuda") for _ in range(28)]
    scratch = norm_route_scratch(rows, HIDDEN, weight.device)
    needs = torch.zeros(1, dtype=torch.int32, device="cuda")
    works = each(lambda r: norm_route(states[0], weight, 1e-6, r, scratch, threshold=0.1, needs=needs), router)
    bench.report(f"norm + router {rows}", bench.measure({"ours": works}), None, "", None)
    qkv = buffers((rows, HEADS.width), most=1)
    keys, values = (buffers((rows, HEADS.key, places, HEADS.size), most=56) for _ in range(2))
    cos = torch.ones(rows, HEADS.rotary, dtype=torch.bfloat16, device="cuda")
    slot = torch.tensor([places - 1], device="cuda")
    first = torch.zeros(rows, dtype=torch.long, device="cuda")
    scratch = attend_scratch(rows, HEADS, slot.device)
    works = each(lambda k, v: attend(qkv[0], HEADS, cos, cos, k, v, slot, first, scratch), keys, values)
    floor = bench.read_floor(2 * rows * HEADS.key * places * HEADS.size * 2)
    bench.report(f"attend {rows} x {places}", bench.measure({"ours": works}), floor, "", None)


def chain(bench: Bench, rows: int, places: int) -> None:
    """One layer after the other as in a step, 14 of them: what overlapping launches gain does not show in single kernels."""
    layers = 14
    with torch.device("cuda"):
        make = {
            "qkv": (4608, HIDDEN),
            "out": (HIDDEN, HIDDEN),
            "gate": (WIDE, HIDDEN),
            "up": (WIDE, HIDDEN),
            "down": (HIDDEN, WIDE),
        }
        weights = [
            {name: (torch.randn(shape) * shape[1] ** -0.5).bfloat16() for name, shape in make.items()}
            for _ in range(layers)
        ]
        h = torch.randn(rows, HIDDEN).bfloat16()
        one = torch.ones(HIDDEN).bfloat16()
        cos = torch.ones(rows, HEADS.rotary).bfloat16()
        caches = [
            [torch.randn(rows, HEADS.key, places, HEADS.size).bfloat16() for _ in range(2)] for _ in range(layers)
        ]
        slot, first = torch.tensor([places - 1]), torch.zeros(rows, dtype=torch.long)
        flags = {"on": torch.ones(1, dtype=torch.int32), "off": torch.zeros(1, dtype=torch.int32)}
        routers = [RouterWeights.pack(router_of(HIDDEN, 16, "cuda"), "cuda") for _ in range(layers)]
        marks = torch.zeros(2, layers, dtype=torch.int32)
        decided = torch.empty(rows), torch.empty(rows, dtype=torch.bool)
        others = [
            (
                Other(torch.randn(RANK, HIDDEN).bfloat16(), activation="silu"),
                Other(torch.randn(HIDDEN, RANK).bfloat16()),
            )
            for _ in range(layers)
        ]
    scratch = attend_scratch(rows, HEADS, h.device)
    scratch2 = norm_route_scratch(rows, HIDDEN, h.device)
    norm = (one, 1e-6, False)

    def step(
        flag: torch.Tensor | None, routed: bool, mlps: bool = True, instead: bool = False, limit: float = 1e9
    ) -> None:
        if routed:
            marks.fill_(PENDING)
        for i, w in enumerate(weights):
            qkv = skinny_linear(h, [w["qkv"]], norm=norm)
            a = attend(qkv, HEADS, cos, cos, *caches[i], slot, first, scratch)
            skinny_linear(a, [w["out"]], residual=h, out=h)
            if not mlps:
                continue
            need, x, mlp_norm, ready = flag, h, norm, None
            if routed:
                need, counter, mlp_norm = marks[0, i : i + 1], marks[1, i : i + 1], None
                x, _, _ = norm_route(
                    h, one, 1e-6, routers[i], scratch2, threshold=limit, needs=need, decided=decided, ready=counter
                )
                ready = counter, PENDING + norm_route_parts(rows, HIDDEN)
            inward, outward = others[i] if instead else (None, None)
            z = skinny_gated(
                x, w["gate"], w["up"], "silu", need=need, settled=not routed, ready=ready, norm=mlp_norm, other=inward
            )
            skinny_linear(z, [w["down"]], residual=h, out=h, need=need, settled=True, other=outward)

    mlp = layers * 3 * HIDDEN * WIDE * 2
    rest = layers * (4608 + HIDDEN) * HIDDEN * 2
    variants = {
        "ours": (lambda: step(None, False), mlp + rest), "all on": (lambda: step(flags["on"], False), mlp + rest),
        "all off": (lambda: step(flags["off"], False), rest), "routed, on": (lambda: step(None, True), mlp + rest),
        "no MLPs": (lambda: step(None, False, False), rest),
        "routed, off": (lambda: step(None, True, limit=-1e9), rest),
        "stand-ins, on": (lambda: step(None, True, instead=True), mlp + rest),
        "stand-ins, off": (lambda: step(None, True, instead=True, limit=-1e9), rest + 2 * layers * RANK * HIDDEN * 2),
    }  # fmt: skip
    samples = bench.measure({name: [work] for name, (work, _) in variants.items()})
    bench.report(f"{layers} layers, {rows} rows, {places} places", samples, bench.read_floor(mlp + rest), "", None)


def prefill(bench: Bench, rows: int = 4096) -> None:
    """The MLP of a prompt pass: dense, and packed with 0 to 100 % of the rows skipping; microseconds."""

    class Mlp(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            make = {"bias": False, "device": "cuda", "dtype": torch.bfloat16}
            self.gate_proj, self.up_proj = (torch.nn.Linear(HIDDEN, WIDE, **make) for _ in range(2))
            self.down_proj = torch.nn.Linear(WIDE, HIDDEN, **make)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    mlp = Mlp()
    packed = PackedMlp.of(mlp, "silu")
    assert packed is not None
    x = buffers((rows, HIDDEN))[0]
    works = {"dense": [lambda: mlp(x)]}
    for share in (0, 25, 50, 75, 100):
        leave = torch.rand(rows, device="cuda").argsort().argsort() < rows * share // 100
        works[f"{share} % skip"] = [lambda leave=leave: packed(x, leave)]
        kept = ~leave
        gap = (packed(x, leave)[kept].float() - mlp(x)[kept].float()).abs().max() if share < 100 else 0.0
        print(f"  packed against dense at {share} %: largest difference {float(gap):.4f}", flush=True)
    samples = bench.measure(works)
    middle = {name: sorted(taken)[len(taken) // 2] for name, taken in samples.items()}
    print("  " + ", ".join(f"{name} {t:.0f} us ({middle['dense'] / t:.2f}x)" for name, t in middle.items()), flush=True)
    bench.report(
        f"prefill MLP, {rows} rows, half skip", {"ours": samples["50 % skip"], **samples}, None, "dense / ours >= 1.7",
        lambda t: middle["dense"] / t >= 1.7,
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_decode.json")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-tests", action="store_true")
    chosen = parser.parse_args()
    cupy = compile.require_gpu()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    if not chosen.no_tests:
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "--maxfail=12"]
        tested = [f"tests/gpu/test_{name}_gpu.py" for name in ("linear", "decode")]
        done = subprocess.run([*command, *tested], cwd=ROOT, capture_output=True, text=True)
        print("\n".join(done.stdout.splitlines()[-100:]) + done.stderr[-1500:], flush=True)
    bench = Bench(chosen.repeats, 300)
    copy(bench)
    for rows in (1, 8, 16, 32, 64):
        linears(bench, rows)
    for rows, places in ((1, 512), (1, 4096), (8, 512), (32, 512), (32, 2048)):
        glue(bench, rows, places)
    for rows, places in ((1, 512), (1, 4096), (8, 512), (32, 512)):
        chain(bench, rows, places)
    prefill(bench)
    table(bench.lines)
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cupy": cupy.__version__}
    facts = {
        "command": " ".join(sys.argv),
        "kernels": fingerprint(),
        "machine": machine,
        "copy_gb_per_s": bench.bandwidth,
        "read_gb_per_s": bench.read_bandwidth,
    }
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(facts | {"microseconds": [asdict(line) for line in bench.lines]}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
