"""One vLLM engine in a process of its own: a JSON question a line on stdin, a JSON answer a line on stdout.

Steps are timed one by one, as the times between the returns of the engine's steps, so that neither prompts nor start-up nor a
single hiccup enters the median; where the engine runs in this process, CUDA events time the replayed graph as well.

    python child.py SPEC.json
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

if sys.path and sys.path[0] == str(Path(__file__).resolve().parent):
    del sys.path[0]  # modules beside this file are the measurer's

LEAD, TAIL = 8, 4
"""Decode steps not counted at the two ends."""


class Graphs:
    """CUDA events around every replay of a graph in this process."""

    def __init__(self, torch: Any):
        self.torch, self.on, self.marks = torch, False, []
        if not torch.cuda.is_available():
            return
        original = torch.cuda.CUDAGraph.replay

        def replay(graph: Any) -> None:
            if not self.on:
                return original(graph)
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            original(graph)
            last.record()
            self.marks.append((first, last))

        torch.cuda.CUDAGraph.replay = replay

    def times(self) -> list[float]:
        if not self.marks:
            return []
        self.torch.cuda.synchronize()
        found = [first.elapsed_time(last) for first, last in self.marks]
        self.marks.clear()
        return found


def middle(values: list[float], digits: int = 4) -> float | None:
    return round(statistics.median(values), digits) if values else None


class Served:
    def __init__(self, spec: dict[str, Any]):
        import numpy as np
        import torch
        import vllm
        from vllm import LLM

        self.np, self.torch, self.spec = np, torch, spec
        self.graphs = Graphs(torch)
        if spec.get("variant"):
            sys.path.insert(0, spec["root"])
            apply_variant(spec["variant"])
        began = time.time()
        self.gated = spec["sedac"] is not None
        self.llm = LLM(**spec["engine"], additional_config={"sedac": spec["sedac"]} if self.gated else {})
        self.about = {
            "up": time.time() - began, "vllm": vllm.__version__, "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "status": self.status() if self.gated else [],
        }  # fmt: skip
        self.stamps: list[float] = []
        self._watch()

    def _watch(self) -> None:
        engine, original = self.llm.llm_engine, self.llm.llm_engine.step

        def step(*args: Any, **kwargs: Any) -> Any:
            done = original(*args, **kwargs)
            self.stamps.append(time.perf_counter())
            return done

        engine.step = step

    def status(self) -> list[dict[str, Any]]:
        return self.llm.collective_rpc("sedac_status")

    def prompts(self, count: int, length: int, seed: int) -> list[dict[str, Any]]:
        random = self.np.random.default_rng(seed)
        high = self.spec["vocab_size"] - 5
        return [{"prompt_token_ids": random.integers(5, high, length).tolist()} for _ in range(count)]

    def generate(self, prompts: list[Any], **sampling: Any) -> tuple[float, list[Any]]:
        from vllm import SamplingParams

        lora = sampling.pop("lora", None)
        wanted = SamplingParams(**({"ignore_eos": True, "temperature": 0.0, "detokenize": False} | sampling))
        start = time.perf_counter()
        done = self.llm.generate(prompts, wanted, use_tqdm=False, lora_request=lora)
        return time.perf_counter() - start, done

    # What can be asked ------------------------------------------------------------------------------------------

    def force(self, off: list[int]) -> dict[str, Any]:
        self.llm.collective_rpc("sedac_force", args=(off,))
        return {}

    def limits(self, values: list[float]) -> dict[str, Any]:
        self.llm.collective_rpc("sedac_set_thresholds", args=(values,))
        return {}

    def steps(self, batch: int, count: int, prompt: int = 64) -> dict[str, Any]:
        """Milliseconds of a decode step."""
        self.stamps.clear()
        self.graphs.marks.clear()
        self.graphs.on = True
        seconds, _ = self.generate(self.prompts(batch, prompt, 0), max_tokens=count + LEAD + TAIL + 1)
        self.graphs.on = False
        between = [(b - a) * 1e3 for a, b in zip(self.stamps, self.stamps[1:], strict=False)]
        counted = between[-count - TAIL : -TAIL] if len(between) > count + TAIL else between
        inside = self.graphs.times()[-count - TAIL : -TAIL]
        ranked = sorted(counted)
        return {
            "ms": middle(counted), "graph_ms": middle(inside), "seconds": round(seconds, 4),
            "tenths": [round(ranked[int(q * (len(ranked) - 1))], 4) for q in (0.1, 0.9)],
        }  # fmt: skip

    def throughput(self, requests: int, prompt: int, new: int, seed: int = 0) -> dict[str, Any]:
        self.stamps.clear()
        seconds, _ = self.generate(self.prompts(requests, prompt, seed), max_tokens=new)
        return {
            "seconds": seconds, "tokens_per_second": requests * (new + prompt) / seconds,
            "new_tokens_per_second": requests * new / seconds, "steps": len(self.stamps),
        }  # fmt: skip

    def output(
        self, new: int, prompts: list[list[int]] | None = None, count: int = 4, length: int = 40, extra: Any = None,
        adapters: list[str | None] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Tokens, their log-probabilities, and those of the prompts' own tokens. `adapters`: a folder for each prompt, or None."""
        given = [{"prompt_token_ids": p} for p in prompts] if prompts else self.prompts(count, length, 7)
        _, done = self.generate(
            given, max_tokens=new, logprobs=0, prompt_logprobs=0, extra_args=extra, lora=lora(adapters)
        )
        return {
            "tokens": [list(r.outputs[0].token_ids) for r in done],
            "logprobs": [[next(iter(step.values())).logprob for step in r.outputs[0].logprobs] for r in done],
            "prompt_logprobs": [read_prompt(r)[0] for r in done],
        }

    def score(self, prompts: list[list[int]]) -> dict[str, Any]:
        """Per prompt: log-probabilities of its tokens, and the most likely token in each place."""
        given = [{"prompt_token_ids": p} for p in prompts]
        seconds, done = self.generate(given, max_tokens=1, prompt_logprobs=1)
        found = [read_prompt(r) for r in done]
        return {"logprobs": [f[0] for f in found], "best": [f[1] for f in found], "seconds": seconds}

    def counts(self, reset: bool = False) -> dict[str, Any]:
        found = {"status": self.status() if self.gated else []}
        if reset and self.gated:
            self.llm.collective_rpc("sedac_reset")
        return found

    def linears(self) -> dict[str, Any]:
        """What the linear layers of the MLPs are: the class, that of the quantization, that of the kernel it took; how many."""
        (found,) = self.llm.apply_model(linears)
        return {"linears": found}

    def metrics(self) -> dict[str, Any]:
        """What Prometheus is told, as it stands in this process."""
        from prometheus_client import REGISTRY

        found = {}
        for family in REGISTRY.collect():
            for sample in family.samples:
                if sample.name.startswith("sedac_") and not sample.name.endswith("_created"):
                    found[f"{sample.name}{json.dumps(sample.labels, sort_keys=True)}"] = sample.value
        return {"metrics": found}


def read_prompt(result: Any) -> tuple[list[float], list[int]]:
    own, best = [], []
    for entry, token in zip(result.prompt_logprobs[1:], result.prompt_token_ids[1:], strict=True):
        own.append(entry[token].logprob)
        best.append(next((t for t, found in entry.items() if found.rank == 1), -1))
    return own, best


def lora(folders: list[str | None] | None) -> Any:
    """A request's adapter for each of these folders; a folder's name ends in the adapter's number."""
    from vllm.lora.request import LoRARequest

    if folders is None:
        return None
    return [folder and LoRARequest(Path(folder).name, int(folder[-1]), folder) for folder in folders]


def linears(model: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for path, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if ".mlp." in path and (method is not None or hasattr(module, "base_layer")):
            scheme = getattr(module, "scheme", None)
            kernels = [getattr(part, name, None) for part in (method, scheme) for name in ("kernel", "fp8_linear")]
            parts = [type(part).__name__ for part in (module, method, scheme, *kernels) if part is not None]
            what = f"{path.rpartition('.mlp.')[2]}: {', '.join(parts)}"
            found[what] = found.get(what, 0) + 1
    return found


def apply_variant(variant: str) -> None:
    """Another way for a captured MLP, to compare with the plugin's own: NAME=VALUE sets a constant of `captured.py`."""
    from sedac_cli.vllm import captured

    for part in variant.split(","):
        name, _, value = part.partition("=")
        before = getattr(captured, name)
        setattr(captured, name, type(before)(int(value)))


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    served = Served(spec)
    answers.write(json.dumps(served.about) + "\n")
    for line in sys.stdin:
        ask = json.loads(line)
        what = ask.pop("do")
        if what == "end":
            break
        try:
            answer = getattr(served, what)(**ask)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
    os._exit(0)


if __name__ == "__main__":
    main()
