"""What it costs to put an MLP under a condition in a CUDA graph, in every way there is: 28 MLPs of 3584 x 18944 with a norm between.

    PYTHONPATH=. python benchmarks/gpu_nodes.py --rows 1,8,32 --out benchmarks/results/gpu_nodes.json

plain      the MLPs, always
ifelse     an IF-ELSE node each; the other branch clears the output (what `mlp=nodes` does in vLLM)
if_clear   an IF node each; the output is cleared before it, and the last product writes into it
if_once    an IF node each; all outputs are cleared by one launch at the start
updatable  no node: the MLP's kernels are marked as device-updatable, and left alone (what the mark costs)
switches   the same, and one launch at the start enables or disables them; a kernel that reads the flag clears the output
flags      our own kernels, which read the flag themselves (up to 64 rows; what `mlp=kernels` does in vLLM)

Weights are random. Times are medians over replays, variants in turn. What fails says why, and the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kernel_sources import fingerprint
from torch import Tensor

from sedac_cli.gpu.compile import _stream as stream_of
from sedac_cli.gpu.compile import code_of, require_conditional_nodes
from sedac_cli.gpu.conditional import ConditionalGraph
from sedac_cli.gpu.packed import activate_rows
from sedac_cli.gpu.skinny import skinny_gated, skinny_linear

VARIANTS = ("plain", "ifelse", "if_clear", "if_once", "updatable", "switches", "flags")
KERNELS = """
extern "C" __device__ __cudart_builtin__ int cudaGraphKernelNodeSetEnabled(void* node, bool enable);
extern "C" __global__ void switch_nodes(const unsigned long long* nodes, const int* flags, const int* place, const int* count) {
  for (int i = threadIdx.x; i < *count; i += blockDim.x)
    cudaGraphKernelNodeSetEnabled((void*)nodes[i], flags[place[i]] != 0);
}
extern "C" __global__ void clear_unless(unsigned int* out, long long words, const int* flag) {
  if (*flag) return;
  for (long long i = blockIdx.x * blockDim.x + threadIdx.x; i < words; i += gridDim.x * blockDim.x) out[i] = 0;
}
"""


class Switches:
    """Kernels of a graph under capture that a launch of the same graph enables or disables."""

    def __init__(self, nodes: ConditionalGraph, capacity: int):
        self.rt, self.check = nodes.runtime.rt, nodes.runtime.check
        self.table = torch.zeros(capacity, dtype=torch.int64, device="cuda")
        self.place = torch.zeros(capacity, dtype=torch.int32, device="cuda")
        self.count = torch.zeros(1, dtype=torch.int32, device="cuda")
        self.found: list[tuple[int, int]] = []
        self.other = 0

    def all_nodes(self, graph: Any) -> dict[int, Any]:
        _, count = self.check(self.rt.cudaGraphGetNodes(graph, 0), "cudaGraphGetNodes")
        if not int(count):
            return {}
        found, count = self.check(self.rt.cudaGraphGetNodes(graph, int(count)), "cudaGraphGetNodes")
        return {int(node): node for node in found[: int(count)]}

    def mark(self, graph: Any, before: dict[int, Any], place: int) -> None:
        rt = self.rt
        attribute = rt.cudaKernelNodeAttributeDeviceUpdatableKernelNode
        for key, node in self.all_nodes(graph).items():
            if key in before:
                continue
            (kind,) = self.check(rt.cudaGraphNodeGetType(node), "cudaGraphNodeGetType")
            if int(kind) != int(rt.cudaGraphNodeType.cudaGraphNodeTypeKernel):
                self.other += 1
                continue
            value = rt.cudaKernelNodeAttrValue()
            value.deviceUpdatableKernelNode.deviceUpdatable = 1
            self.check(rt.cudaGraphKernelNodeSetAttribute(node, attribute, value), "cudaGraphKernelNodeSetAttribute")
            handle = int(value.deviceUpdatableKernelNode.devNode)
            if not handle:
                (value,) = self.check(
                    rt.cudaGraphKernelNodeGetAttribute(node, attribute), "cudaGraphKernelNodeGetAttribute"
                )
                handle = int(value.deviceUpdatableKernelNode.devNode)
            if not handle:
                raise RuntimeError("a device-updatable node has no handle")
            self.found.append((handle, place))

    def fill(self) -> None:
        n = len(self.found)
        self.table[:n] = torch.tensor([h if h < 2**63 else h - 2**64 for h, _ in self.found])
        self.place[:n] = torch.tensor([p for _, p in self.found], dtype=torch.int32)
        self.count.fill_(n)


class Bench:
    def __init__(self, layers: int, width: int, inner: int):
        torch.manual_seed(0)
        self.layers, self.width, self.inner = layers, width, inner

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * shape[1] ** -0.5

        self.gate_up = [random(2 * inner, width) for _ in range(layers)]
        self.down = [random(width, inner) for _ in range(layers)]
        self.weight = torch.ones(width, device="cuda", dtype=torch.bfloat16)
        self.flags = torch.ones(layers, dtype=torch.int32, device="cuda")
        self.nodes = ConditionalGraph()
        cupy = require_conditional_nodes()
        major, minor = torch.cuda.get_device_capability()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "nodes.ptx"
            path.write_bytes(code_of(KERNELS, "nodes", f"{major}{minor}", linked=False))
            module = cupy.RawModule(path=str(path))
            self.kernels = {name: module.get_function(name) for name in ("switch_nodes", "clear_unless")}
            _ = [kernel.num_regs for kernel in self.kernels.values()]
        self.graphs: list[Any] = []
        self.kept: list[Any] = []

    def launch(self, name: str, grid: int, *args: Any) -> None:
        values = tuple(np.uintp(a.data_ptr()) if isinstance(a, Tensor) else a for a in args)
        with stream_of(torch.cuda.current_stream().cuda_stream):
            self.kernels[name]((grid,), (256,), values)

    def mlp(self, i: int, x: Tensor, out: Tensor | None = None) -> Tensor:
        both = torch.nn.functional.linear(x, self.gate_up[i])
        gate, up = both.chunk(2, dim=1)
        z = activate_rows(gate, up, "silu", self.rows_count)
        if out is None:
            return torch.nn.functional.linear(z, self.down[i])
        return torch.mm(z, self.down[i].t(), out=out)

    def few(self, i: int, x: Tensor, out: Tensor) -> None:
        flag = self.flags[i : i + 1]
        z = skinny_gated(x, self.gate_up[i][: self.inner], self.gate_up[i][self.inner :], "silu", need=flag)
        skinny_linear(z, [self.down[i]], out=out, need=flag)

    def pass_of(self, variant: str, x: Tensor, switches: Switches, buffers: Tensor) -> Tensor:
        conditions: Any = None
        if variant in ("ifelse", "if_clear", "if_once"):
            conditions = self.nodes.conditions(self.layers, either=variant == "ifelse")
            conditions.set(self.flags)
        if variant == "if_once":
            buffers.zero_()
        if variant == "switches":
            self.launch("switch_nodes", 1, switches.table, self.flags, switches.place, switches.count)
        for i in range(self.layers):
            n = torch.nn.functional.rms_norm(x, (self.width,), self.weight)
            if variant == "plain":
                y = self.mlp(i, n)
            elif variant == "flags":
                y = torch.zeros_like(n)
                self.few(i, n, y)
            elif variant == "ifelse":
                run, otherwise = conditions.branches(i)
                with run:
                    y = self.mlp(i, n)
                with otherwise:
                    y.zero_()
            elif variant in ("if_clear", "if_once"):
                y = torch.zeros_like(n) if variant == "if_clear" else buffers[i]
                with conditions.body(i):
                    self.mlp(i, n, out=y)
            else:
                graph, *_ = self.nodes.runtime.capture(torch.cuda.current_stream().cuda_stream)
                before = switches.all_nodes(graph)
                y = self.mlp(i, n)
                switches.mark(graph, before, i)
                if variant == "switches":
                    words = y.numel() // 2
                    self.launch(
                        "clear_unless", max(1, min(64, words // 2048)), y, np.int64(words), self.flags[i : i + 1]
                    )
            x = x + y
        return x

    def build(self, variant: str, rows: int) -> tuple[Callable[[], None], Tensor]:
        self.rows_count = torch.full((1,), rows, dtype=torch.int32, device="cuda")
        torch.manual_seed(rows)
        x = torch.randn(rows, self.width, device="cuda", dtype=torch.bfloat16)
        buffers = torch.zeros(self.layers, rows, self.width, device="cuda", dtype=torch.bfloat16)
        switches = Switches(self.nodes, 16 * self.layers)
        spare = torch.zeros_like(x)
        self.nodes.warm(lambda: (self.mlp(0, x), self.mlp(0, x, out=spare)))
        self.mlp(0, x)
        if variant == "flags":
            self.few(0, x, spare)
        self.launch("clear_unless", 1, spare, np.int64(8), self.flags[:1])
        self.launch("switch_nodes", 1, switches.table, self.flags, switches.place, switches.count)
        torch.cuda.synchronize()
        marked = variant in ("updatable", "switches")
        graph = torch.cuda.CUDAGraph(keep_graph=True) if marked else torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="relaxed"):
            out = self.pass_of(variant, x, switches, buffers)
        self.kept += [graph, x, buffers, switches, self.rows_count]
        if not marked:
            return graph.replay, out
        switches.fill()
        torch.cuda.synchronize()
        rt, check, stream = switches.rt, switches.check, torch.cuda.current_stream().cuda_stream
        (made,) = check(rt.cudaGraphInstantiate(rt.cudaGraph_t(graph.raw_cuda_graph()), 0), "cudaGraphInstantiate")
        check(rt.cudaGraphUpload(made, stream), "cudaGraphUpload")
        torch.cuda.synchronize()
        print(f"    {variant}: {len(switches.found)} kernels marked, {switches.other} other nodes", flush=True)

        def replay() -> None:
            check(rt.cudaGraphLaunch(made, torch.cuda.current_stream().cuda_stream), "cudaGraphLaunch")

        return replay, out


def timed(replay: Callable[[], None], times: int) -> float:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(times):
        replay()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / times * 1e3


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,8,32")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--width", type=int, default=3584)
    parser.add_argument("--inner", type=int, default=18944)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    bench = Bench(args.layers, args.width, args.inner)
    document: dict[str, Any] = {
        "command": vars(args) | {"out": str(args.out)}, "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "kernels": fingerprint(),
        "unit": "us per MLP", "weights": "random", "samples": [], "failed": {},
    }  # fmt: skip
    shares = {"on": 0, "quarter off": 4, "half off": 2, "off": 1}
    for rows in [int(x) for x in args.rows.split(",")]:
        made: dict[str, Callable[[], None]] = {}
        outputs: dict[str, Tensor] = {}
        for variant in args.variants.split(","):
            if variant == "flags" and rows > 64:
                continue
            try:
                made[variant], outputs[variant] = bench.build(variant, rows)
            except Exception as error:
                traceback.print_exc(limit=4)
                document["failed"][f"{variant} {rows}"] = f"{type(error).__name__}: {error}"
        seen: dict[str, list[Tensor]] = {name: [] for name in made}
        for share, every in shares.items():
            off = [every and i % every == every - 1 for i in range(args.layers)]
            bench.flags.copy_(torch.tensor([0 if o else 1 for o in off], dtype=torch.int32))
            for name, replay in made.items():
                replay()
                torch.cuda.synchronize()
                seen[name].append(outputs[name].float().clone())
            samples: dict[str, list[float]] = {name: [] for name in made}
            for repeat in range(args.repeats + 1):
                for name, replay in made.items():
                    taken = timed(replay, 10) / args.layers
                    if repeat:
                        samples[name].append(taken)
            base = statistics.median(samples["plain"]) if "plain" in samples else None
            for name, values in samples.items():
                document["samples"].append({"rows": rows, "variant": name, "flags": share, "us": values})
                middle = statistics.median(values)
                more = "" if base is None else f"  {middle - base:+7.2f}  {middle / base:.3f}x"
                print(f"rows {rows:3d}  {share:12s} {name:10s} {middle:8.2f} us{more}", flush=True)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(document, indent=1))
        for name, states in seen.items():
            against = seen.get("ifelse")
            if against is None or name in ("plain", "updatable"):
                continue
            off_by = [float((a - b).norm() / b.norm()) for a, b in zip(states, against, strict=True)]
            document.setdefault("against ifelse", {})[f"{name} {rows}"] = off_by
            print(
                f"rows {rows:3d}  {name:10s} differs from ifelse by " + " ".join(f"{x:.1e}" for x in off_by), flush=True
            )
    args.out.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
