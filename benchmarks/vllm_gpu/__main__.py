"""SEDAC inside vLLM on one or two GPUs: what its targets say, part by part.

    python benchmarks/vllm_gpu --parts exact,steps --minutes 8 --out benchmarks/results/vllm_steps.json
    python benchmarks/vllm_gpu --parts decide --ways nodes,kernels --out benchmarks/results/vllm_decide.json
    python benchmarks/vllm_gpu --parts throughput --kv-gib 10 --sizes 1,8,32,256 --out benchmarks/results/vllm_throughput.json
    python benchmarks/vllm_gpu --parts quality --model MODEL --gate-file GATES.pth --text TEXT.txt --out quality.json
    python benchmarks/vllm_gpu --parts tp2 --out benchmarks/results/vllm_tp2.json                  # two GPUs
    python benchmarks/vllm_gpu --parts runners,families --out benchmarks/results/vllm_more.json
    python benchmarks/vllm_gpu --parts quant,lora --together 6 --out benchmarks/results/vllm_quant_more.json

Each part's docstring says what it measures. Weights are random but in part quality. A part that fails or is late is reported
and the next one begins; results are in the document as soon as they are there, the ends of the engines' logs beside it. On a
machine without a GPU `--shape tiny --alone` tries everything that is not about speed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import platform
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from lab import FailedError, Lab, TooLateError, clocks
from report import table
from shapes import ROOT, SHAPES, make_artifacts, make_work

PARTS = {
    "exact": ("part_equal", "exact"), "steps": ("part_steps", "run"), "decide": ("part_decide", "run"),
    "throughput": ("part_throughput", "run"), "quality": ("part_equal", "quality"), "tp2": ("part_tp2", "run"),
    "quant": ("part_quant", "run"), "lora": ("part_lora", "run"), "families": ("part_equal", "families"),
    "runners": ("part_steps", "runners"),
}  # fmt: skip

TP_ENGINES = ("plain", "silu", "nodes", "kernels", "learned", "one")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/vllm_gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parts", default="exact,steps", help="in this order, of " + ", ".join(PARTS))
    add("--out", type=Path, default=ROOT / "benchmarks" / "results" / "vllm_gpu.json")
    add("--minutes", type=float, default=8.5, help="for everything")
    add("--part-minutes", type=float, default=8.5, help="for one part")
    add("--start-seconds", type=float, default=240, help="for an engine to come up")
    add("--shape", default="qwen2.5-7b", choices=list(SHAPES))
    add("--alone", action="store_true", help="one engine at a time: no interleaving")
    add("--most", type=int, default=5, help="engines alive at a time; each takes 20 GiB and its --kv-gib")
    add("--together", type=int, default=3, help="engines that start at the same time")
    add("--kv-gib", type=float, default=2, help="of each engine; 256 x 640 tokens need 9; 0: vLLM's own choice")
    add("--memory", type=float, default=0.1, help="share of the GPU that must be free when an engine starts")
    add("--cudagraph-mode", default="FULL_AND_PIECEWISE")
    add("--sizes", default="1,8,32", help="batch sizes vLLM captures graphs for")
    add("--rounds", type=int, default=6)
    add("--steps", type=int, default=80, help="decode steps of a sample")
    add("--batches", default="1,8,32")
    add("--engines", default="plain;silu;nodes;kernels", help="of part steps, by ';'; WAY:NAME=VALUE,.. is a variant")
    add("--shares", default="0,0.25,0.5", help="of MLPs forced off")
    add("--ways", default="nodes,kernels", help="part decide: how gated MLPs run")
    add("--gates", default="cascade,learned,routers", help="part decide; adaptive as well")
    add("--tokens", type=int, default=48, help="parts exact and tp2: new tokens that are compared")
    add("--requests", type=int, default=256)
    add("--prompt", type=int, default=512)
    add("--new", type=int, default=128)
    add("--throughput-rounds", type=int, default=3)
    add("--model", type=Path, help="part quality: a trained model's folder")
    add("--gate-file", type=Path, help="part quality: what sedac distill wrote for it")
    add("--gate-shares", default="0.25")
    add("--text", type=Path, help="part quality: text it was not trained on")
    add("--samples", type=int, default=96, help="part quality: sequences of 512 tokens")
    add("--dtype", default="bfloat16", help="part quality: of both runtimes")
    add("--families", default="llama,qwen3", help="also qwen2, mistral, gemma, gemma2, gemma3_text, phi3")
    add("--quantization", default="gptq,awq,bitsandbytes,fp8", help="also int8, none, gptq:32")
    add("--quant-speed", action="store_true", help="part quant: also step times of the large shape in fp8")
    add("--tp", type=int, default=2)
    add("--tp-engines", default=",".join(TP_ENGINES), help="part tp2: which; one: on one GPU, to compare tokens with")
    args = parser.parse_args()
    args.sizes = [int(x) for x in args.sizes.split(",")]
    args.tp_engines = args.tp_engines.split(",")
    args.adaptive = "adaptive" in args.gates
    unknown = [part for part in args.parts.split(",") if part not in PARTS]
    if unknown:
        parser.error(f"--parts: {', '.join(unknown)} is not among {', '.join(PARTS)}")
    if unknown := [name for name in args.tp_engines if name not in TP_ENGINES]:
        parser.error(f"--tp-engines: {', '.join(unknown)} is not among {', '.join(TP_ENGINES)}")
    return args


def main() -> int:
    args = options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # engines are stopped on the way out
    work = Path(tempfile.mkdtemp(prefix="sedac-vllm-"))
    make_work(work, SHAPES[args.shape])
    make_artifacts(work, SHAPES[args.shape])
    lab = Lab(args, work)
    lab.document |= {
        "command": ["python", "benchmarks/vllm_gpu", *sys.argv[1:]], "host": platform.node(), "weights": "random",
        "shape": args.shape, "runner": os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "default"), "clocks": clocks(),
    }  # fmt: skip
    failed = False
    try:
        for part in args.parts.split(","):
            failed |= not run_part(lab, part)
    finally:
        lab.stop_all()
        lab.save()
        lab.keep_logs()
    return int(failed)


def run_part(lab: Lab, part: str) -> bool:
    module, function = PARTS[part]
    lab.begin(part)
    began = time.monotonic()
    found: dict[str, Any] = lab.document["parts"][part]
    print(f"{part}: {lab.left():.0f} s are left", file=sys.stderr, flush=True)
    fine = True
    try:
        getattr(importlib.import_module(module), function)(lab)
    except (TooLateError, FailedError) as error:
        found["error"], fine = f"{type(error).__name__}: {error}", False
    except Exception:
        found["error"], fine = traceback.format_exc(), False
    found["seconds"] = round(time.monotonic() - began, 1)
    if not fine:
        print(f"{part}: {found['error']}", file=sys.stderr, flush=True)
        lab.stop_all()  # whatever is in their pipes belongs to a question nobody waits for
    lab.save()
    with contextlib.suppress(BrokenPipeError):
        print("\n".join(table(part, found)), flush=True)
    return fine


if __name__ == "__main__":
    sys.exit(main())
