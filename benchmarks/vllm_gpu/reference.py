"""What the Hugging Face runtime of SEDAC says, in a process of its own: `python reference.py ASK.json ANSWER.json`.

validate   the gate on a text, as `sedac validate` runs it: its measures, and the tokens themselves, for vLLM to score
tokens     greedy tokens, log-probabilities and skips of a gate on given prompts, dense and gated
make       a small random model of a family, saved, with probes and thresholds that no rounding decides
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[0] = str(ROOT)

import torch  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load(ask: dict[str, Any]) -> Any:
    from sedac_cli.config import ModelSpec
    from sedac_cli.models import load_model

    return load_model(ModelSpec(ref=ask["model"], dtype=ask["dtype"], device=DEVICE))


def validate(ask: dict[str, Any]) -> dict[str, Any]:
    from sedac_cli.config import TextSpec
    from sedac_cli.corpus import Corpus
    from sedac_cli.pipeline.evaluate import evaluate
    from sedac_cli.runtime.plan import make_plan

    loaded = load(ask)
    plan = make_plan(ask["gate"], loaded.decoder, loaded.identity)
    spec = TextSpec(dataset=ask["text"], samples=ask["samples"], max_length=ask["length"])
    corpus = Corpus(spec, loaded.tokenizer)
    found = evaluate(loaded, plan.gate, corpus, 16, plan.standin)
    return {
        "measures": found.measures(), "intervals": found.intervals(0), "skip_rates": found.real.skip_rates,
        "samples": list(corpus.samples()), "per_sequence": {k: v.tolist() for k, v in found.per_sequence().items()},
        "vocab_size": loaded.decoder.vocab_size,
    }  # fmt: skip


@torch.inference_mode()
def tokens(ask: dict[str, Any]) -> dict[str, Any]:
    from sedac_cli.runtime.skip import skipping
    from sedac_cli.vllm.plan import ModelShape, build_plan
    from sedac_cli.vllm.settings import read_settings

    loaded = load(ask)
    config = loaded.model.config
    shape = ModelShape.of(type("Config", (), {"hf_text_config": config, "model": ask["model"]}))
    answer = {}
    for name, settings in ask["gates"].items():
        plan = build_plan(read_settings(settings, {}), shape)
        plan.gate.to(DEVICE)
        plan.standin.to(DEVICE) if hasattr(plan.standin, "to") else None
        rows: dict[str, list[Any]] = {"tokens": [], "prompt_logprobs": []}
        with skipping(loaded.model, plan.gate, plan.standin, decoder=loaded.decoder) as run:
            for prompt in ask["prompts"]:
                ids, cache, out = torch.tensor([prompt], device=DEVICE), None, []
                for step in range(ask["new"]):
                    result = loaded.model(input_ids=ids, past_key_values=cache, use_cache=True)
                    cache = result.past_key_values
                    scores = torch.log_softmax(result.logits[0].float(), -1)
                    if step == 0:
                        rows["prompt_logprobs"].append([float(scores[i, t]) for i, t in enumerate(prompt[1:])])
                    out.append(int(scores[-1].argmax()))
                    ids = torch.tensor([[out[-1]]], device=DEVICE)
                rows["tokens"].append(out)
        answer[name] = {**rows, "skipped": run.skipped_per_layer}
    return answer


@torch.no_grad()
def make(ask: dict[str, Any]) -> dict[str, Any]:
    """Weights large enough that the prediction is not the same everywhere: a comparison must be able to fail."""
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from sedac_cli.artifacts.tensors import save_tensors
    from sedac_cli.probes import LREProbe, probe_name

    folder, layers = Path(ask["folder"]), ask["layers"]
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        ask["family"], hidden_size=ask["hidden"], intermediate_size=2 * ask["hidden"], num_hidden_layers=layers,
        num_attention_heads=ask["hidden"] // 64, num_key_value_heads=2, head_dim=64, vocab_size=2048, pad_token_id=0,
        max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).bfloat16().eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name:
            parameter.normal_(0, 1.5 * parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    words = Tokenizer(
        models.WordLevel({f"t{i}": i for i in range(2048)}, unk_token="t0")
    )  # it is loaded, and never asked
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0").save_pretrained(folder)
    points, limits = [layers // 4, layers // 2], []
    entering: dict[int, list[Any]] = {point: [] for point in points}
    for prompt in ask["prompts"]:
        states = model(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states
        for point in points:
            entering[point].append(states[point][0].float())
    for point in points:
        probe = LREProbe(ask["hidden"], 16).requires_grad_(False)
        save_tensors(folder / probe_name(point), probe.state_dict())
        limits.append(widest(probe(torch.cat(entering[point])), 0.3))
    return {"checkpoints": points, "thresholds": limits}


def widest(values: Any, share: float) -> float:
    """A threshold with about `share` of the values under it, in the widest gap near by."""
    ranked = values.flatten().sort().values
    n = len(ranked)
    low, high = max(0, int(n * (share - 0.1))), min(n - 2, int(n * (share + 0.1)))
    place = low + int((ranked[low + 1 : high + 2] - ranked[low : high + 1]).argmax())
    return float((ranked[place] + ranked[place + 1]) / 2)


if __name__ == "__main__":
    question = json.loads(Path(sys.argv[1]).read_text())
    work = {"validate": validate, "tokens": tokens, "make": make}[question.pop("do")]
    Path(sys.argv[2]).write_text(json.dumps(work(question)))
