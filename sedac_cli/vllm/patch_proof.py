"""Proof that a gate is live in the vLLM of an interpreter: a tiny random model is made, served, and its MLPs are skipped.

Two halves. `prove` starts this module in the other interpreter and judges what comes back: the handshakes of all processes
and the counts of a run. `main` is what runs there, through vLLM's ordinary `LLM`, with nothing set but what a user would set.

    facts = prove(site, variables={"SEDAC_ENABLED": "1"})
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sedac_cli.artifacts.files import read_json, write_json
from sedac_cli.errors import InputError
from sedac_cli.vllm import handshake

LAYERS, OFF = 4, [1, 3]
PROMPT = list(range(5, 29))
SECONDS = 900
# The gate is the proof's own, since the user's was made for another model; whether there is one at all is the environment's word.
OWN_GATE = {
    "SEDAC_GATE": "forced:none", "SEDAC_SINKS": "0", "SEDAC_PROTECT_FIRST": "0", "SEDAC_PROTECT_LAST": "0", "SEDAC_PHASE": "both",
}  # fmt: skip


@dataclass(frozen=True)
class Proof:
    vllm: str
    workers: int
    processes: int
    """That loaded the plugin."""
    runner: str
    device: str
    how: str
    tokens: int
    skipped: list[int]
    """Tokens whose MLP was not computed, by layer."""
    change: float
    """Largest difference of a log-probability with and without these MLPs."""


def prove(interpreter: str, variables: dict[str, str], seconds: float = SECONDS) -> Proof:
    """Run the tiny model there and check what it says; an InputError tells what is missing."""
    with tempfile.TemporaryDirectory(prefix="sedac-proof-") as name:
        folder = Path(name)
        reports = folder / "handshakes"
        reports.mkdir()
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SEDAC_")}
        environment |= OWN_GATE | variables
        environment |= {
            handshake.VARIABLE: str(reports), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_CI_ENV": "1",
        }  # fmt: skip
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        log = folder / "log"
        code = _run([interpreter, "-m", __name__, str(folder)], folder, environment, log, seconds)
        result = folder / "result.json"
        if code != 0 or not result.is_file():
            raise InputError(f"vLLM did not run the tiny model (exit code {code}):\n{_tail(log)}")
        facts = read_json(result)
        return _judged(facts, handshake.read_reports(reports))


def _judged(facts: dict[str, Any], reports: list[dict[str, Any]]) -> Proof:
    engines = [entry for entry in reports if entry["role"] == "engine"]
    if not engines or facts["status"] is None:
        loaded = sum(entry["role"] == "process" for entry in reports)
        raise InputError(
            f"vLLM {facts['vllm']} ran the tiny model without a gate ({loaded} of its processes loaded the plugin)",
            hint="if VLLM_PLUGINS is set, it must name sedac; a tree in which plugins are not seen takes --target",
        )
    workers = handshake.require_workers(reports, engines[0]["workers"], engines[0]["digest"])
    status = facts["status"]
    expected = [status["tokens"] if layer in OFF else 0 for layer in range(LAYERS)]
    if status["skipped"] != expected or not status["tokens"]:
        raise InputError(f"the MLPs of layers {OFF} were turned off: {status['skipped']} skipped, expected {expected}")
    if not facts["change"] > 0:
        raise InputError(f"turning the MLPs of layers {OFF} off changed nothing in what the model says")
    return Proof(
        facts["vllm"], len(workers), sum(entry["role"] == "process" for entry in reports), status["runner"], status["device"],
        status["how"], status["tokens"], status["skipped"], facts["change"],
    )  # fmt: skip


def _run(command: list[str], folder: Path, environment: dict[str, str], log: Path, seconds: float) -> int:
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise InputError(f"vLLM has not run the tiny model within {seconds:.0f} s:\n{_tail(log)}") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _tail(log: Path, lines: int = 12) -> str:
    found = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "\n".join("  " + line[-300:] for line in found[-lines:])


# In the other interpreter ---------------------------------------------------------------------------------------------


def main(folder: Path) -> None:
    import vllm
    from vllm.platforms import current_platform

    model = folder / "model"
    save_tiny_model(model)
    llm = vllm.LLM(
        model=str(model), skip_tokenizer_init=True, max_model_len=128, max_num_seqs=4, seed=0, enable_prefix_caching=False,
        gpu_memory_utilization=0.2, kv_cache_memory_bytes=1 << 26, enforce_eager=not current_platform.is_cuda(),
    )  # fmt: skip
    facts: dict[str, Any] = {"vllm": vllm.__version__, "status": None, "change": 0.0}
    try:
        llm.collective_rpc("sedac_force", args=([],))
    except Exception as error:  # a worker without the plugin does not know the name
        print(f"no gate answers: {error}", file=sys.stderr)
    else:
        dense = logprobs(llm)
        llm.collective_rpc("sedac_force", args=(OFF,))
        llm.collective_rpc("sedac_reset")
        skipping = logprobs(llm)
        facts["status"] = llm.collective_rpc("sedac_status")[0]
        facts["change"] = max(abs(a - b) for a, b in zip(dense, skipping, strict=True))
    write_json(folder / "result.json", facts)
    llm.llm_engine.engine_core.shutdown()


def logprobs(llm: Any) -> list[float]:
    """What the model gives for each token of the prompt but the first."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=4, temperature=0, prompt_logprobs=0, ignore_eos=True, detokenize=False)
    done = llm.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False)[0]
    return [entry[token].logprob for entry, token in zip(done.prompt_logprobs[1:], PROMPT[1:], strict=True)]


def save_tiny_model(folder: Path) -> None:
    """A random Qwen2 of four layers, with weights large enough for every MLP to matter."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2", vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    config_file = folder / "config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"dtype": "bfloat16"}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
