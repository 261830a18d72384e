"""Speed of a gate inside vLLM on one GPU: engines stand side by side on it and are measured in turn, round after round.

Each engine is a process of its own with the same model (the shape of Qwen2.5-7B, random weights, bf16) and the same vLLM settings;
only one works at a time. A step is timed as the difference of two generations of different length, so prompts and start-up cancel.

    python benchmarks/vllm_gpu.py --engines plain,silu,never,nodes,kernels --out benchmarks/results/vllm_gpu.json
    python benchmarks/vllm_gpu.py --engines plain,nodes,cascade,learned --out benchmarks/results/vllm_gpu_gates.json
    python benchmarks/vllm_gpu.py --engines plain,nodes --batches "" --throughput --kv-gib 12 --out benchmarks/results/vllm_gpu_throughput.json

An engine takes about 20 GiB of the GPU.

Engines: plain (no plugin), never (plugin, gate never), silu (plain, with vLLM's own activation kernel), nodes and kernels (layers
forced off in the two ways a gated MLP can run), cascade and learned (gates that decide, made to skip exactly what is forced).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {
    "qwen2.5-7b": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "hidden_act": "silu", "bos_token_id": 0, "eos_token_id": 1,
    },
    "tiny": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "hidden_act": "silu", "bos_token_id": 0, "eos_token_id": 1,
    },
}  # fmt: skip
ENGINES = ("plain", "never", "silu", "nodes", "kernels", "cascade", "learned")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0", "VLLM_USE_NCCL_SYMM_MEM": "0",
}  # fmt: skip


def off_layers(layers: int, share: float) -> list[int]:
    """Evenly spread: 25 % is every fourth layer, 50 % every second."""
    return [i for i in range(layers) if int((i + 1) * share + 1e-9) > int(i * share + 1e-9)]


# One engine, in its own process ---------------------------------------------------------------------------------


def serve(name: str, args: argparse.Namespace, work: Path) -> None:
    """Answer one JSON line after another from stdin. Everything else that prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    shape = SHAPES[args.shape]
    layers = shape["num_hidden_layers"]
    asked = settings_for(name, args, work, shape)
    import numpy as np
    import torch
    import vllm
    from vllm import LLM, SamplingParams

    began = time.time()
    compilation: dict = {"cudagraph_mode": args.cudagraph_mode, "cudagraph_capture_sizes": args.sizes}
    if name == "silu":
        compilation["custom_ops"] = ["+silu_and_mul", "+gelu_and_mul"]
    llm = LLM(
        model=str(work / "model"), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_model_len=2048,
        gpu_memory_utilization=args.memory, kv_cache_memory_bytes=args.kv_gib * 2**30, max_num_seqs=max(args.sizes),
        max_num_batched_tokens=8192, enable_prefix_caching=False, seed=0, compilation_config=compilation,
        tensor_parallel_size=args.tp, additional_config={"sedac": asked} if asked else {},
    )  # fmt: skip
    status = llm.collective_rpc("sedac_status") if asked else []
    answers.write(json.dumps({
        "up": time.time() - began, "vllm": vllm.__version__, "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(), "status": status,
    }) + "\n")  # fmt: skip

    def generate(batch: int, new: int, prompt: int = 64, logprobs: int | None = None, seed: int = 0):
        random = np.random.default_rng(seed)
        prompts = [
            {"prompt_token_ids": random.integers(5, shape["vocab_size"] - 5, prompt).tolist()} for _ in range(batch)
        ]
        sampling = SamplingParams(max_tokens=new, ignore_eos=True, temperature=0.0, detokenize=False, logprobs=logprobs)
        start = time.perf_counter()
        done = llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start, done

    for line in sys.stdin:
        ask = json.loads(line)
        if ask["do"] == "end":
            break
        if ask["do"] == "force":
            llm.collective_rpc("sedac_force", args=(off_layers(layers, ask["share"]),))
            answer = {}
        elif ask["do"] == "step":
            short, _ = generate(ask["batch"], 16)
            long, _ = generate(ask["batch"], 16 + ask["steps"])
            answer = {"ms": (long - short) / ask["steps"] * 1e3}
        elif ask["do"] == "throughput":
            seconds, _ = generate(ask["batch"], ask["new"], ask["prompt"])
            answer = {"seconds": seconds, "tokens_per_second": ask["batch"] * (ask["new"] + ask["prompt"]) / seconds}
        elif ask["do"] == "output":
            _, done = generate(4, 24, logprobs=0, seed=7)
            answer = {
                "tokens": [list(r.outputs[0].token_ids) for r in done],
                "logprobs": [[next(iter(step.values())).logprob for step in r.outputs[0].logprobs] for r in done],
            }
        elif ask["do"] == "status":
            answer = {"status": llm.collective_rpc("sedac_status") if asked else []}
            if asked:
                llm.collective_rpc("sedac_reset")
        answers.write(json.dumps(answer) + "\n")
    os._exit(0)


def settings_for(name: str, args: argparse.Namespace, work: Path, shape: dict) -> dict | None:
    if name in ("plain", "silu"):
        return None
    if name == "never":
        return {"gate": "never"}
    if name in ("nodes", "kernels"):
        return {"gate": "forced:none", "mlp": name}
    if name == "cascade":  # nobody exits at the first two, everybody at the middle checkpoint: half of all MLPs
        layers = shape["num_hidden_layers"]
        return {
            "probe_dir": str(work), "probe_layers": [layers // 4, layers // 2, 3 * layers // 4], "adaptive": args.adaptive,
            "thresholds": [0.0, 1e9, 1e9], "exit_rates": [0.0, 1.0, 1.0], "calibration_steps": 1, "mlp": args.gate_mlp,
        }  # fmt: skip
    return {"gate": f"learned:{work}/sedac_gates.pth@0.5", "mlp": args.gate_mlp}


def make_artifacts(work: Path, shape: dict, rank: int) -> None:
    """Probes and routers of real size whose outcome is known: every second layer's router says skip."""
    import torch

    sys.path.insert(0, str(ROOT))
    from sedac_cli.artifacts.gates_file import GatesFile
    from sedac_cli.artifacts.manifest import ModelIdentity
    from sedac_cli.artifacts.tensors import save_tensors
    from sedac_cli.gates.learned import Router
    from sedac_cli.models import ARCHITECTURE_KEYS
    from sedac_cli.probes import LREProbe, probe_name
    from sedac_cli.standins.lowrank import LowRank

    torch.manual_seed(0)
    layers, width = shape["num_hidden_layers"], shape["hidden_size"]
    for layer in (layers // 4, layers // 2, 3 * layers // 4):
        save_tensors(work / probe_name(layer), LREProbe(width, 64).state_dict())
    off = off_layers(layers, 0.5)
    routers, standins = {}, {}
    for layer in range(layers):
        router = Router(width, 16).requires_grad_(False)
        router.inner.normal_(0, width**-0.5)
        router.bias.fill_(1e6 if layer in off else -1e6)
        routers[layer] = router.state_dict()
        if rank and layer in off:
            low = LowRank(width, rank).requires_grad_(False)
            low.a.normal_(0, width**-0.5)
            standins[layer] = low.state_dict()
    identity = ModelIdentity(
        ref="random", architecture={key: shape.get(key) for key in ARCHITECTURE_KEYS}, config_digest="", tokenizer_digest="",
        dtype="bfloat16", weights_sample=[],
    )  # fmt: skip
    curve = [{"share": 0.5, "limit": 0.0}]
    GatesFile("learned", identity, 0, routers, standins, curve, {"options": {"target_skip": 0.5}}).write(
        work / "sedac_gates.pth"
    )


# The measurer ---------------------------------------------------------------------------------------------------


class Engine:
    def __init__(self, name: str, arguments: list[str], work: Path):
        site = work / "site" / "sedac-0.dist-info"  # so that vLLM finds the plugin of this checkout
        if not site.exists():
            site.mkdir(parents=True)
            (site / "METADATA").write_text("Metadata-Version: 2.1\nName: sedac\nVersion: 0\n")
            (site / "entry_points.txt").write_text("[vllm.general_plugins]\nsedac = sedac_cli.vllm.plugin:register\n")
        path = os.pathsep.join(filter(None, [str(ROOT), str(site.parent), os.environ.get("PYTHONPATH")]))
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SEDAC_")}
        environment |= ENVIRONMENT | {"PYTHONPATH": path, "VLLM_CACHE_ROOT": str(work / "cache")}
        if "--tp" not in arguments:
            environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if name in ("plain", "silu"):
            environment["VLLM_PLUGINS"] = "none"
        self.name = name
        self.log = (work / f"{name}.log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, __file__, *arguments, "--serve", name, "--work", str(work)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment,
        )  # fmt: skip
        self.about: dict = {}

    def answer(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            tail = Path(self.log.name).read_text(errors="replace").splitlines()[-40:]
            raise SystemExit(f"engine {self.name} ended:\n" + "\n".join(tail))
        return json.loads(line)

    def ask(self, **what) -> dict:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        return self.answer()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default="plain,silu,never,nodes,kernels")
    parser.add_argument("--shape", default="qwen2.5-7b", choices=list(SHAPES))
    parser.add_argument("--batches", default="1,8,32", help="empty: no step times")
    parser.add_argument("--sizes", default="1,8,32,256", help="batch sizes vLLM captures graphs for")
    parser.add_argument("--shares", default="0,0.25,0.5,1", help="of MLPs forced off")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--together", type=int, default=2, help="engines that start at the same time")
    parser.add_argument("--kv-gib", type=int, default=2, help="of each engine; 256 x 640 tokens need 10")
    parser.add_argument(
        "--memory", type=float, default=0.1, help="share of the GPU that must be free when an engine starts"
    )
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--cudagraph-mode", default="FULL_AND_PIECEWISE")
    parser.add_argument(
        "--adaptive", action="store_true", help="the cascade learns its thresholds (then its rate is its own)"
    )
    parser.add_argument("--gate-mlp", default="nodes", choices=["nodes", "kernels"], help="for cascade and learned")
    parser.add_argument("--standin-rank", type=int, default=0, help="of the learned gate's stand-ins; 0: none")
    parser.add_argument("--throughput", action="store_true", help="256 prompts of 512 tokens, 128 new ones each")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "vllm_gpu.json")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.sizes = [int(x) for x in args.sizes.split(",")]
    if args.serve:
        serve(args.serve, args, args.work)
        return
    names = args.engines.split(",")
    if unknown := set(names) - set(ENGINES):
        parser.error(f"engines {sorted(unknown)} are not known: {', '.join(ENGINES)}")
    work = Path(tempfile.mkdtemp(prefix="sedac-vllm-"))
    (work / "model").mkdir()
    (work / "model" / "config.json").write_text(json.dumps(SHAPES[args.shape]))
    make_artifacts(work, SHAPES[args.shape], args.standin_rank)
    engines = start(names, args, work)
    result = {
        "command": [sys.executable.rsplit("/", 1)[-1], *sys.argv], "host": platform.node(), "weights": "random",
        "shape": args.shape, "runner": os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "default"),
        "engines": {e.name: e.about for e in engines}, "outputs": {}, "steps": [], "throughput": [],
    }  # fmt: skip
    try:
        outputs(engines, result)
        save(result, args.out)
        steps(engines, args, result)
        save(result, args.out)
        if args.throughput:
            throughput(engines, args, result)
        for engine in engines:
            result["engines"][engine.name]["at_end"] = engine.ask(do="status")["status"]
    finally:
        save(result, args.out)
        for engine in engines:
            engine.process.kill()
    report(result)


def start(names: list[str], args: argparse.Namespace, work: Path) -> list[Engine]:
    arguments = [a for a in sys.argv[1:] if a != "--throughput"]
    made: list[Engine] = []
    for place in range(0, len(names), args.together):
        group = [Engine(name, arguments, work) for name in names[place : place + args.together]]
        made += group
        try:
            for engine in group:
                engine.about = engine.answer()
                print(f"{engine.name}: up in {engine.about['up']:.0f} s", file=sys.stderr, flush=True)
        except SystemExit:
            for engine in made:
                engine.process.kill()
            raise
    return made


def forced(engine: Engine) -> bool:
    return engine.name in ("nodes", "kernels")


def outputs(engines: list[Engine], result: dict) -> None:
    """Token ids and log-probabilities of the same prompts; forced engines with every MLP on."""
    got = {}
    for engine in engines:
        if forced(engine):
            engine.ask(do="force", share=0.0)
        if forced(engine) or engine.name in ("plain", "silu", "never"):
            got[engine.name] = engine.ask(do="output")
    for name, against in (("never", "plain"), ("nodes", "silu"), ("kernels", "silu"), ("silu", "plain")):
        if name in got and against in got:
            same = got[name] == got[against]
            drift = max(
                (
                    abs(a - b)
                    for x, y in zip(got[name]["logprobs"], got[against]["logprobs"], strict=True)
                    for a, b in zip(x, y, strict=True)
                ),
                default=0.0,
            )
            result["outputs"][f"{name} = {against}"] = {"same": same, "largest_logprob_difference": drift}
    result["outputs"]["raw"] = got


def steps(engines: list[Engine], args: argparse.Namespace, result: dict) -> None:
    shares = [float(x) for x in args.shares.split(",")]
    for batch in [int(x) for x in args.batches.split(",") if x]:
        for engine in engines:
            engine.ask(do="step", batch=batch, steps=16)
        for number in range(args.rounds):
            for engine in engines:
                for share in shares if forced(engine) else [None]:
                    if share is not None:
                        engine.ask(do="force", share=share)
                    ms = engine.ask(do="step", batch=batch, steps=args.steps)["ms"]
                    result["steps"].append(
                        {"round": number, "batch": batch, "engine": engine.name, "share": share, "ms": ms}
                    )


def throughput(engines: list[Engine], args: argparse.Namespace, result: dict) -> None:
    size = {"batch": max(args.sizes), "prompt": 512, "new": 128}
    for number in range(-1, args.rounds):
        for engine in engines:
            for share in (0.0, 0.25, 0.5) if forced(engine) else (None,):
                if share is not None:
                    engine.ask(do="force", share=share)
                got = engine.ask(do="throughput", **size)
                if number >= 0:  # the first round warms up
                    result["throughput"].append({"round": number, "engine": engine.name, "share": share, **size, **got})


def save(result: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1))


def report(result: dict) -> None:
    print(json.dumps({k: v for k, v in result["outputs"].items() if k != "raw"}))
    for table, value in (("steps", "ms"), ("throughput", "tokens_per_second")):
        groups: dict = {}
        for row in result[table]:
            groups.setdefault((row["batch"], row["engine"], row["share"]), []).append(row[value])
        for (batch, engine, share), values in groups.items():
            plain = groups.get((batch, "plain", None))
            middle = statistics.median(values)
            ratio = "" if plain is None else f"  {middle / statistics.median(plain):.3f} x plain"
            what = engine if share is None else f"{engine} {share:.0%} off"
            print(
                f"{table} batch {batch:4d}  {what:18s} {middle:10.3f} [{min(values):.3f} .. {max(values):.3f}]{ratio}"
            )


if __name__ == "__main__":
    main()
