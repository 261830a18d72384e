"""What sedac costs on a CPU: each figure with its target and its raw samples. `make bench-cpu`, about five minutes.

    python benchmarks/cpu.py --out benchmarks/results/cpu.json [--model FOLDER] [--only help,collect,memory,train,gated]

A comparison is run A B A B, so that whatever else the machine does meets both sides; a figure is a median, a ratio is the
median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PAIRS = 5


@dataclass
class Figure:
    """`limit` is a bound from above if `most`, from below otherwise."""

    name: str
    value: float
    unit: str
    limit: float
    most: bool
    note: str
    samples: dict[str, Any]
    busy_before: float

    @property
    def reached(self) -> bool:
        return self.value <= self.limit if self.most else self.value >= self.limit


def busy(seconds: float = 0.5) -> float:
    """Share of all cores in use by anybody over a moment."""

    def read() -> tuple[int, int]:
        times = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        return sum(times), times[3] + times[4]

    if not Path("/proc/stat").exists():
        return 0.0
    total, idle = read()
    time.sleep(seconds)
    later, later_idle = read()
    return 1 - (later_idle - idle) / max(1, later - total)


def quiet(patience: float = 20.0) -> float:
    """Wait a while for the machine to be idle; the share that was busy at last is recorded beside the figure."""
    until = time.monotonic() + patience
    while (share := busy()) > 0.15 and time.monotonic() < until:
        time.sleep(1)
    return round(share, 3)


def python(*args: object) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *map(str, args)], env=environment, check=True, capture_output=True, text=True
    ).stdout


def clock(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# The figures -------------------------------------------------------------------------------------------------


def bench_help(args: argparse.Namespace) -> list[Figure]:
    python("-m", "sedac_cli", "--help")
    before = quiet()
    samples = [clock(lambda: python("-m", "sedac_cli", "--help")) for _ in range(10)]
    return [Figure("sedac --help", statistics.median(samples), "s", 0.5, True, "median of 10", {"s": samples}, before)]


def bench_collect(args: argparse.Namespace) -> list[Figure]:
    """`collect` (tokenizing, three layers, entropies, files; not the loading) against the forward passes alone."""
    import torch

    from sedac_cli.config import ModelSpec, TextSpec
    from sedac_cli.corpus import Corpus
    from sedac_cli.models import load_model
    from sedac_cli.pipeline.collect import CollectOptions, collect

    loaded = load_model("builtin:tiny")
    text = TextSpec("builtin:books", samples=32, max_length=512)
    batches = [torch.tensor(samples) for samples in Corpus(text, loaded.tokenizer).batches(8)]

    @torch.inference_mode()
    def bare() -> float:
        return clock(lambda: [loaded.model(input_ids=ids, use_cache=False) for ids in batches])

    def ours() -> float:
        with tempfile.TemporaryDirectory() as folder:
            return collect(CollectOptions(save_dir=Path(folder)), ModelSpec(), text).seconds

    bare(), ours()
    before = quiet()
    samples: dict[str, list[float]] = {"collect_s": [], "bare_s": []}
    for _ in range(PAIRS):
        samples["collect_s"].append(ours())
        samples["bare_s"].append(bare())
    ratio = statistics.median(a / b for a, b in zip(samples["collect_s"], samples["bare_s"], strict=True))
    tokens = sum(ids.numel() for ids in batches)
    note = f"builtin:tiny, {tokens:,} tokens, {PAIRS} pairs; {tokens / statistics.median(samples['collect_s']):,.0f} tokens/s"
    return [Figure("collect / bare forward passes", ratio, "x", 1.15, True, note, samples, before)]


PEAK = """
import sys
from pathlib import Path
from sedac_cli.config import ModelSpec, TextSpec
from sedac_cli.pipeline.collect import CollectOptions, collect
options = CollectOptions(layers=tuple(range(28)), save_dir=Path(sys.argv[1]))
collect(options, ModelSpec(), TextSpec(samples=int(sys.argv[2]), max_length=128))
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(int(status["VmHWM"].split()[0]) / 1024)  # ru_maxrss would begin at the parent's peak
"""


def bench_memory(args: argparse.Namespace) -> list[Figure]:
    """Peak memory of a process that collects 10 times the samples, at every layer: it must not grow."""
    peaks = {}
    for samples in (20, 200):
        with tempfile.TemporaryDirectory() as folder:
            peaks[f"{samples}_samples_mib"] = float(python("-c", PEAK, folder, samples))
    few, many = peaks.values()
    note = f"{few:,.0f} -> {many:,.0f} MiB; 200 samples of 128 tokens are {200 * 128 * 28 * 128 * 4 / 2**20:,.0f} MiB of states"
    return [Figure("collect: peak memory, 10x the samples", many / few, "x", 1.10, True, note, peaks, 0.0)]


def bench_train(args: argparse.Namespace) -> list[Figure]:
    """Training on SYNTHETIC states: only the time means anything."""
    import torch

    from sedac_cli.artifacts.manifest import Manifest, ModelIdentity, make_step
    from sedac_cli.artifacts.tensors import save_tensors
    from sedac_cli.pipeline.train_probes import TrainOptions, train_probes

    layers, samples, length, width = (7, 14, 21), 400, 500, 384
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = samples * length
        tensors = {"token_ids.pt": torch.zeros(rows, dtype=torch.int32)}
        tensors["sequence_ids.pt"] = torch.arange(samples).repeat_interleave(length).int()
        for layer in layers:
            states = torch.randn(rows, width, generator=generator)
            tensors[f"hidden_states_layer{layer}.pt"] = states
            tensors[f"entropies_layer{layer}.pt"] = states[:, :8].square().sum(1).sqrt()
        files = {name: save_tensors(folder / name, value) for name, value in tensors.items()}
        model = ModelIdentity(ref="synthetic", architecture={}, config_digest="", tokenizer_digest="", dtype="float32",
                              weights_sample=[])  # fmt: skip
        step = make_step({"layers": list(layers), "target": "final"}, files, {"label_unit": "bits"})
        Manifest(model=model, steps={"collect": step}).write(folder)
        before = quiet()
        report = train_probes(folder, TrainOptions(epochs=20))
    note = f"SYNTHETIC data: {rows:,} tokens x {width} x {len(layers)} layers, 20 epochs"
    raw = {"seconds": report.seconds, "per_layer": [layer.seconds for layer in report.layers]}
    return [Figure("train-probes", report.seconds, "s", 60, True, note, raw, before)]


def bench_gated(args: argparse.Namespace) -> list[Figure]:
    """`always:l` from the middle layer on: what share of the saving that the FLOPs promise is there on the clock."""
    import torch

    from sedac_cli.corpus import Corpus, TextSpec
    from sedac_cli.costs import model_costs
    from sedac_cli.models import load_model
    from sedac_cli.runtime.skip import skipping

    loaded = load_model(args.model)
    decoder = loaded.decoder
    text = TextSpec("builtin:books", samples=8, max_length=512)
    ids = torch.tensor(next(Corpus(text, loaded.tokenizer).batches(8)))
    half = decoder.num_layers // 2
    costs = model_costs(decoder, context=512)
    rates = [float(layer >= half) for layer in range(decoder.num_layers)]
    promised = costs.saved(rates)

    @torch.inference_mode()
    def forward() -> float:
        return clock(lambda: loaded.model(input_ids=ids, use_cache=False))

    def gated() -> float:
        with skipping(loaded.model, f"always:{half}", decoder=decoder):
            return forward()

    forward(), gated()
    before = quiet()
    samples: dict[str, list[float]] = {"dense_s": [], "gated_s": []}
    for _ in range(2 * PAIRS):  # the noisiest figure: single pairs differ by a tenth
        samples["dense_s"].append(forward())
        samples["gated_s"].append(gated())
    pairs = list(zip(samples["dense_s"], samples["gated_s"], strict=True))
    saved = statistics.median(1 - b / a for a, b in pairs)
    name = args.model if args.model.startswith("builtin:") else Path(args.model).name
    note = f"{name}, always:{half}, 8 x 512 tokens: {promised:.1%} of FLOPs skipped, {saved:.1%} of time saved, {len(pairs)} pairs"
    raw = samples | {"promised": promised, "saved": saved, "model": name}
    return [Figure("time saved / FLOPs skipped, eager", saved / promised, "x", 0.85, False, note, raw, before)]


BENCHES = {
    "help": bench_help,
    "collect": bench_collect,
    "memory": bench_memory,
    "train": bench_train,
    "gated": bench_gated,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "cpu.json")
    parser.add_argument("--model", default="builtin:tiny", help="for the gated forward pass")
    parser.add_argument("--only", default=",".join(BENCHES), help="comma-separated")
    args = parser.parse_args()

    import torch

    from sedac_cli.artifacts.files import make_folder, write_json
    from sedac_cli.artifacts.manifest import versions

    figures: list[Figure] = []
    machine = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
    }
    make_folder(args.out.parent)
    for name in args.only.split(","):
        print(f"{name} ...", file=sys.stderr, flush=True)
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            figures += BENCHES[name](args)
        rows = [asdict(f) | {"reached": f.reached} for f in figures]
        write_json(args.out, {"machine": machine, "versions": versions(), "figures": rows})
    print(f"{'figure':<40}{'measured':>10}  {'target':>10}  reached")
    for f in figures:
        bound = ("<= " if f.most else ">= ") + f"{f.limit:g} {f.unit}"
        print(f"{f.name:<40}{f.value:>8.3f} {f.unit}  {bound:>10}  {'yes' if f.reached else 'NO'}\n    {f.note}")
    print(f"raw samples: {args.out}")
    return 0 if all(f.reached for f in figures) else 1


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


if __name__ == "__main__":
    sys.exit(main())
