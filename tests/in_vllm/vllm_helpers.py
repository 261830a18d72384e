"""vLLM on the CPU, in this process: one engine per model family, its gate changed between tests. A start takes 20-60 seconds."""

from __future__ import annotations

import os

os.environ.update(
    HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_CI_ENV="1", VLLM_NO_USAGE_STATS="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR",
    SEDAC_ENABLED="0",  # whatever `sedac patch` has left in this environment
)  # fmt: skip

import gc
from pathlib import Path

import torch

SIZE = {"hidden_size": 128, "intermediate_size": 192, "max_position_embeddings": 256, "head_dim": 32}
PROMPTS = [list(range(5, 45)), [7], [11, 90, 200, 33, 8]]


class Engine:
    """A running vLLM and what a test wants of it. One of a process may be gated: whoever is next takes the gate away from the last."""

    gated: Engine | None = None

    def __init__(self, folder: Path, **options):
        from vllm import LLM

        self.folder = folder
        values = {
            "model": str(folder), "dtype": "float32", "max_model_len": 256, "gpu_memory_utilization": 0.2, "seed": 0,
            "max_num_seqs": 8, "max_num_batched_tokens": 256, "enforce_eager": True, "enable_prefix_caching": False,
        }  # fmt: skip
        self.llm = LLM(**(values | options))

    @property
    def worker(self):
        found = self.llm.llm_engine.model_executor.driver_worker
        return getattr(found, "worker", found)

    def gate(self, spec: str | None = None, **settings):
        """Put another gate in force; None takes it away."""
        from sedac_cli.vllm.settings import read_settings
        from sedac_cli.vllm.worker import gate_model

        if Engine.gated not in (None, self):
            Engine.gated.gate(None)
        worker, Engine.gated = self.worker, None
        if getattr(worker, "sedac", None) is not None:
            worker.sedac.remove()
            worker.model_runner.__dict__.pop("_model_forward", None)
            worker.sedac = None
        if spec is None and not settings:
            return None
        asked = settings if spec is None else {"gate": spec, **settings}
        worker.sedac = gate_model(worker, read_settings(asked, {}))
        Engine.gated = self
        return worker.sedac

    def run(self, prompts=None, tokens: int = 8, extra=None, lora=None):
        """(new tokens, log-probabilities of the prompt's tokens and of the new ones), a list per prompt. `lora`: one each."""
        from vllm import SamplingParams

        prompts = prompts or PROMPTS
        extras = extra if isinstance(extra, list) else [extra] * len(prompts)
        sampling = [
            SamplingParams(
                max_tokens=tokens, temperature=0, prompt_logprobs=0, logprobs=0, ignore_eos=True, extra_args=e
            )
            for e in extras
        ]
        asked = [{"prompt_token_ids": p} for p in prompts]
        done = self.llm.generate(asked, sampling, use_tqdm=False, lora_request=lora)
        new = [list(r.outputs[0].token_ids) for r in done]
        logprobs = []
        for r, p in zip(done, prompts, strict=True):
            read = [entry[token].logprob for entry, token in zip(r.prompt_logprobs[1:], p[1:], strict=True)]
            fresh = [entry[t].logprob for entry, t in zip(r.outputs[0].logprobs, r.outputs[0].token_ids, strict=True)]
            logprobs.append(read + fresh)
        return new, logprobs

    def close(self):
        from vllm.distributed import cleanup_dist_env_and_memory

        self.gate(None)
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        cleanup_dist_env_and_memory()


@torch.inference_mode()
def hugging_face(loaded, plan, prompts=None, tokens: int = 8):
    """What `Engine.run` returns, from the Hugging Face runtime with the same gate, one prompt at a time."""
    from sedac_cli.runtime.skip import skipping

    new, logprobs = [], []
    with skipping(loaded.model, plan.gate, plan.standin, decoder=loaded.decoder) as run:
        for prompt in prompts or PROMPTS:
            ids, cache, out, read = torch.tensor([prompt]), None, [], []
            for step in range(tokens):
                result = loaded.model(input_ids=ids, past_key_values=cache, use_cache=True)
                cache = result.past_key_values
                scores = torch.log_softmax(result.logits[0].float(), -1)
                if step == 0:
                    read += [float(scores[i, token]) for i, token in enumerate(prompt[1:])]
                best = int(scores[-1].argmax())
                read.append(float(scores[-1, best]))
                out.append(best)
                ids = torch.tensor([[best]])
            new.append(out)
            logprobs.append(read)
    return new, logprobs, run


@torch.no_grad()
def states_of(loaded, prompts):
    """(hidden_states[l] of all prompt tokens, by l; inputs of the MLPs, by l)."""
    entering: dict[int, list] = {}
    inputs: dict[int, list] = {}
    handles = []
    for layer in range(loaded.decoder.num_layers):
        handles.append(
            loaded.decoder.at_checkpoint(layer, lambda h, layer=layer: entering.setdefault(layer, []).append(h[0]))
        )
        handles.append(loaded.decoder.at_mlp(layer, lambda x, layer=layer: inputs.setdefault(layer, []).append(x[0])))
    for prompt in prompts:
        loaded.model(input_ids=torch.tensor([prompt]))
    for handle in handles:
        handle.remove()
    return {k: torch.cat(v) for k, v in entering.items()}, {k: torch.cat(v) for k, v in inputs.items()}


def between(values: torch.Tensor, share: float) -> float:
    """A threshold with about `share` of the values under it, in the widest gap near by: rounding decides nothing."""
    ranked = values.sort().values
    n = len(ranked)
    low, high = max(0, int(n * (share - 0.15))), min(n - 2, int(n * (share + 0.15)))
    place = low + int((ranked[low + 1 : high + 2] - ranked[low : high + 1]).argmax())
    return float((ranked[place] + ranked[place + 1]) / 2)


def save_probes(folder: Path, loaded, prompts, layers, share: float, gate: str = "cascade") -> list[float]:
    """Random probes, thresholds that let a share of the prompts' tokens exit at each, and thresholds.json."""
    from sedac_cli.artifacts.files import sha256_file
    from sedac_cli.artifacts.tensors import save_tensors
    from sedac_cli.artifacts.thresholds import GuardSettings, ProbeFile, Promise, Thresholds
    from sedac_cli.probes import LREProbe, probe_name

    torch.manual_seed(3)
    entering, _ = states_of(loaded, prompts)
    limits, files = [], {}
    for layer in layers:
        probe = LREProbe(loaded.decoder.hidden_size, 8).requires_grad_(False)
        name = probe_name(layer)
        save_tensors(folder / name, probe.state_dict())
        limits.append(between(probe(entering[layer]), share))
        files[layer] = ProbeFile(file=name, sha256=sha256_file(folder / name))
    Thresholds(
        gate=gate, layers=list(layers), thresholds=limits, probes=files, guards=GuardSettings(), target_label="test",
        found_by={}, promise=Promise(kind="exit-rate", target={}), model=loaded.identity,
    ).write(folder / "thresholds.json")  # fmt: skip
    return limits


def save_gates(path: Path, loaded, share: float = 0.4) -> None:
    """A gates file with random routers and stand-ins, and a curve with one true row: `share` of the prompts' tokens."""
    from sedac_cli.artifacts.gates_file import GatesFile
    from sedac_cli.gates.learned import Router
    from sedac_cli.standins.lowrank import LowRank

    torch.manual_seed(4)
    _, inputs = states_of(loaded, PROMPTS)
    routers, standins, scores = {}, {}, []
    for layer in range(1, loaded.decoder.num_layers):
        router = Router(loaded.decoder.hidden_size, 4).requires_grad_(False)
        low = LowRank(loaded.decoder.hidden_size, 6).requires_grad_(False)
        for parameter in (*router.parameters(), *low.parameters()):
            parameter.normal_(0, 0.3)
        scores.append(router(inputs[layer]))
        routers[layer], standins[layer] = router.state_dict(), low.state_dict()
    limit = between(torch.cat(scores), 1 - share)
    curve = [{"share": share, "limit": limit}]
    GatesFile("learned", loaded.identity, 0, routers, standins, curve, {"options": {"target_skip": share}}).write(path)
