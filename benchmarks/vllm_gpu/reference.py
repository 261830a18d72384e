"""What the Hugging Face runtime of SEDAC says, in a process of its own: `python reference.py ASK.json ANSWER.json`.

validate   the gate on a text, as `sedac validate` runs it: its measures, and the tokens themselves, for vLLM to score
tokens     greedy tokens, log-probabilities and skips of a gate on given prompts, dense and gated
score      log-probabilities of given tokens, by several models with a gate each
make       a small random model of a family, saved, with probes and thresholds that no rounding decides
quantize   that model as checkpoints of several methods, and the weights that each of them rounds to
adapters   random adapters of that model, and its weights with each of them added
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[0] = str(ROOT)
sys.path.insert(1, str(ROOT / "tests" / "in_vllm"))

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


def gated(loaded: Any, model: str, settings: dict[str, Any]) -> Any:
    """The context in which a model skips as the plugin would be told to."""
    from sedac_cli.runtime.skip import skipping
    from sedac_cli.vllm.plan import ModelShape, build_plan
    from sedac_cli.vllm.settings import read_settings

    shape = ModelShape.of(type("Config", (), {"hf_text_config": loaded.model.config, "model": model}))
    plan = build_plan(read_settings(settings, {}), shape)
    plan.gate.to(DEVICE)
    plan.standin.to(DEVICE) if hasattr(plan.standin, "to") else None
    return skipping(loaded.model, plan.gate, plan.standin, decoder=loaded.decoder)


@torch.inference_mode()
def tokens(ask: dict[str, Any]) -> dict[str, Any]:
    loaded = load(ask)
    answer = {}
    for name, settings in ask["gates"].items():
        rows: dict[str, list[Any]] = {"tokens": [], "prompt_logprobs": []}
        with gated(loaded, ask["model"], settings) as run:
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


def score(ask: dict[str, Any]) -> dict[str, Any]:
    """By the names of `runs`: {model, gate, sequences, inputs}; `inputs`: the quantization whose rounding of inputs to repeat."""
    return {name: tried(lambda run=run: scored(run)) for name, run in ask["runs"].items()}


@torch.inference_mode()
def scored(run: dict[str, Any]) -> list[list[float]]:
    from quantize import rounding_inputs

    loaded = load({"model": run["model"], "dtype": "float32"})
    rounding_inputs(loaded.model, run.get("inputs", ""))
    found = []
    with gated(loaded, run["model"], run["gate"]):
        for sequence in run["sequences"]:
            scores = torch.log_softmax(loaded.model(input_ids=torch.tensor([sequence], device=DEVICE)).logits[0], -1)
            found.append([float(scores[i, token]) for i, token in enumerate(sequence[1:])])
    return found


def quantize(ask: dict[str, Any]) -> dict[str, Any]:
    return {method: tried(lambda method=method: quantized(ask, method)) for method in ask["methods"]}


def quantized(ask: dict[str, Any], method: str) -> dict[str, str]:
    """`METHOD` or `METHOD:GROUP`; `none` is the model as it is."""
    from quantize import KINDS, ON_LOADING

    name, _, group = method.partition(":")
    source, to = Path(ask["model"]), Path(ask["folder"]) / method.replace(":", "-")
    if name == "none":
        return {"packed": str(source), "rounded": str(source)}
    if name not in KINDS | ON_LOADING:
        raise ValueError(f"is not among none, {', '.join(KINDS | ON_LOADING)}")
    saved = (KINDS | ON_LOADING)[name](source, to, **({"group": int(group)} if group else {}))
    return {"packed": str(saved.packed), "rounded": str(saved.rounded)}


def adapters(ask: dict[str, Any]) -> list[dict[str, str]]:
    from adapters import save_adapter

    made = []
    for seed in range(1, ask["count"] + 1):
        adapter, merged = Path(ask["folder"]) / f"adapter{seed}", Path(ask["folder"]) / f"merged{seed}"
        adapter.parent.mkdir(parents=True, exist_ok=True)
        save_adapter(Path(ask["model"]), adapter, merged, seed)
        made.append({"adapter": str(adapter), "merged": str(merged)})
    return made


def tried(work: Any) -> Any:
    """One that fails does not take the others with it."""
    try:
        return work()
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


@torch.no_grad()
def make(ask: dict[str, Any]) -> dict[str, Any]:
    """Weights large enough that the prediction is not the same everywhere: a comparison must be able to fail."""
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from sedac_cli.artifacts.tensors import save_tensors
    from sedac_cli.probes import LREProbe, probe_name

    folder, layers = Path(ask["folder"]), ask["layers"]
    torch.manual_seed(0)
    tied = ask["family"].startswith("gemma")  # vLLM refuses one that is not
    config = AutoConfig.for_model(
        ask["family"], hidden_size=ask["hidden"], intermediate_size=2 * ask["hidden"], num_hidden_layers=layers,
        num_attention_heads=ask["hidden"] // 64, num_key_value_heads=2, head_dim=64, vocab_size=2048, pad_token_id=0,
        max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, tie_word_embeddings=tied,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).bfloat16().eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and (tied or "embed" not in name):
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
    todo = {
        "validate": validate, "tokens": tokens, "score": score, "make": make, "quantize": quantize, "adapters": adapters,
    }  # fmt: skip
    Path(sys.argv[2]).write_text(json.dumps(todo[question.pop("do")](question)))
