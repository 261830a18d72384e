"""vLLM on the CPU, in this process: one engine per model family, its gate changed between tests. A start takes 20-60 seconds."""

from __future__ import annotations

import os

os.environ.update(
    HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_CI_ENV="1", VLLM_NO_USAGE_STATS="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR",
)  # fmt: skip

import gc
import importlib.util
from pathlib import Path

import pytest
import torch
from conftest import save_tiny

HAVE_VLLM = importlib.util.find_spec("vllm") is not None
SIZE = {"hidden_size": 128, "intermediate_size": 192, "max_position_embeddings": 256, "head_dim": 32}
PROMPTS = [list(range(5, 45)), [7], [11, 90, 200, 33, 8]]


def pytest_collection_modifyitems(items):
    for item in items:
        if "vllm" in item.keywords and not HAVE_VLLM:
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed here: make vllm-test makes an environment"))


class Engine:
    """A running vLLM and what a test wants of it."""

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

        worker = self.worker
        if getattr(worker, "sedac", None) is not None:
            worker.sedac.remove()
            for holder, names in ((worker.model_runner, ("_model_forward",)),):
                for name in names:
                    holder.__dict__.pop(name, None)
            worker.sedac = None
        if spec is None and not settings:
            return None
        asked = settings if spec is None else {"gate": spec, **settings}
        worker.sedac = gate_model(worker, read_settings(asked, {}))
        return worker.sedac

    def run(self, prompts=None, tokens: int = 8, extra=None):
        """(new tokens, log-probabilities of the prompt's tokens and of the new ones), a list per prompt."""
        from vllm import SamplingParams

        prompts = prompts or PROMPTS
        extras = extra if isinstance(extra, list) else [extra] * len(prompts)
        sampling = [
            SamplingParams(max_tokens=tokens, temperature=0, prompt_logprobs=0, logprobs=0, ignore_eos=True, extra_args=e)
            for e in extras
        ]
        done = self.llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
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


def families() -> list[str]:
    return os.environ.get("SEDAC_TEST_FAMILIES", "qwen2,llama,qwen3,mistral,gemma").split(",")


@pytest.fixture(scope="session", params=families())
def family(request, tmp_path_factory):
    """(engine, the same model under Hugging Face)."""
    from sedac_cli.models import load_model

    folder = save_tiny(tmp_path_factory.mktemp("vllm") / request.param, request.param, **SIZE)
    engine = Engine(folder)
    yield engine, load_model(str(folder))
    engine.close()


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
