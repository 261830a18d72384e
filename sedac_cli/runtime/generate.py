"""Generate text with a gate in force, and keep what was decided for every token.

result = generate(loaded, gate, ["The sea was"], GenerateOptions(max_new_tokens=32))
result.texts[0], result.skip_ratio, result.tokens_per_second
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch

from sedac_cli.errors import InputError
from sedac_cli.gates.base import Gate
from sedac_cli.gates.deep import DeepThinking
from sedac_cli.models import LoadedModel
from sedac_cli.runtime.deep import thinking
from sedac_cli.runtime.skip import Pass, skipping
from sedac_cli.standins import StandIn


@dataclass(frozen=True)
class GenerateOptions:
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    chat: bool = False
    ignore_eos: bool = False


@dataclass(frozen=True)
class TokenDecision:
    """A generated token and what the pass that produced it skipped; `rounds`: how often that pass was run again."""

    text: str
    token: int
    skipped: int
    exit_layer: int
    rounds: int = 0


@dataclass(frozen=True)
class DeepReport:
    """Deep thinking: generated tokens that were computed again, and the forward passes this took."""

    tau_high: float
    max_rounds: int
    tokens: int
    passes: int


@dataclass(frozen=True)
class Generated:
    """Rates count generated tokens of all prompts; `decode_*` leaves the prompt pass out.

    Skip ratios are 1 - MLPs run / MLPs that a dense model runs once: what is computed again counts against them.
    """

    texts: list[str]
    tokens: list[list[TokenDecision]]
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    tokens_per_second: float
    decode_tokens_per_second: float
    skip_ratio: float
    skip_ratio_decode: float
    average_exit_layer: float
    num_layers: int
    skip_ratios: list[float]
    """Of each prompt."""
    deep: DeepReport | None = None


@torch.inference_mode()
def generate(
    loaded: LoadedModel,
    gate: Gate,
    prompts: list[str],
    options: GenerateOptions,
    standin: StandIn | None = None,
    on_pass: Callable[[Pass], None] | None = None,
    deep: DeepThinking | None = None,
) -> Generated:
    inputs = encode_prompts(loaded, prompts, options)
    width = inputs["input_ids"].shape[1]
    check_room(loaded, width, options.max_new_tokens)
    torch.manual_seed(options.seed)
    # A model that was saved after training may have its cache switched off: every step would compute the whole text.
    sampling: dict[str, Any] = {"do_sample": options.temperature > 0, "use_cache": True}
    if options.temperature > 0:
        sampling |= {"temperature": options.temperature, "top_p": options.top_p, "top_k": options.top_k}
    if options.ignore_eos:
        sampling |= {"eos_token_id": None}
    with ExitStack() as stack:
        run = stack.enter_context(
            skipping(loaded.model, gate, standin, decoder=loaded.decoder, keep_passes=True, on_pass=on_pass)
        )
        thought = None if deep is None else stack.enter_context(thinking(run, deep))
        began = time.perf_counter()
        out = loaded.model.generate(
            **inputs, max_new_tokens=options.max_new_tokens, pad_token_id=loaded.tokenizer.pad_token_id,
            **sampling,
        )  # fmt: skip
        if out.is_cuda:
            torch.cuda.synchronize(out.device)
        total = time.perf_counter() - began
    new = out[:, width:]
    ends = end_tokens(loaded, options)
    passes = iter(run.passes)
    steps = [list(islice(passes, count)) for count in (thought.calls if thought else [1] * len(run.passes))]
    rounds = [r[:, -1] for r in thought.rounds] if thought else [torch.zeros_like(new[:, 0])] * len(steps)
    result = _describe(loaded, steps, rounds, new, ends, inputs["attention_mask"].sum(dim=1).tolist(), total)
    if deep is None or thought is None:
        return result
    again = sum(token.rounds > 0 for row in result.tokens for token in row)
    return replace(result, deep=DeepReport(deep.tau_high, deep.max_rounds, again, thought.passes))


def check_room(loaded: LoadedModel, prompt: int, new_tokens: int) -> None:
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if limit and prompt + new_tokens > limit:
        raise InputError(
            f"a prompt of {prompt} tokens and {new_tokens} new ones exceed the model's {limit} positions",
            hint=f"--max-new-tokens {limit - prompt} or a shorter prompt"
            if prompt < limit
            else f"a prompt of at most {limit - 1} tokens",
        )


def end_tokens(loaded: LoadedModel, options: GenerateOptions | None = None) -> set[int]:
    """Tokens that end a text; none, if the options say to go on."""
    if options is not None and options.ignore_eos:
        return set()
    value = loaded.model.generation_config.eos_token_id
    return set() if value is None else set(value) if isinstance(value, (list, tuple)) else {value}


def encode_prompts(loaded: LoadedModel, prompts: list[str], options: GenerateOptions) -> dict[str, torch.Tensor]:
    """Left-padded ids and mask; through the model's chat template when asked for."""
    tokenizer = loaded.tokenizer
    if options.chat:
        prompts = [chat_text(loaded, [{"role": "user", "content": p}]) for p in prompts]
    if not prompts or any(not p for p in prompts):
        raise InputError("an empty prompt: there is nothing to continue")
    # A chat template writes the special tokens itself.
    encoded = tokenizer(
        prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=not options.chat
    )
    if not encoded["attention_mask"].any(dim=1).all():
        raise InputError("a prompt without a single token: there is nothing to continue")
    return {key: encoded[key].to(loaded.device) for key in ("input_ids", "attention_mask")}


def chat_text(loaded: LoadedModel, messages: list[dict[str, str]], tokenizer: Any = None) -> str:
    """The messages as the model was trained to read them, up to where its answer begins. It holds the special tokens."""
    tokenizer = tokenizer or loaded.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(f"{loaded.identity.ref} has no chat template", hint="leave --chat out")
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _describe(
    loaded: LoadedModel, steps: list[list[Pass]], rounds: list[torch.Tensor], new: torch.Tensor, ends: set[int],
    prompt_tokens: list[int], total: float,
) -> Generated:  # fmt: skip
    """`steps`: the passes behind each generated token, the last of which produced it."""
    layers = loaded.decoder.num_layers
    skipped = torch.stack([step[-1].skipped[:, -1] for step in steps], dim=1).tolist()
    exits = torch.stack([step[-1].exit_layer[:, -1] for step in steps], dim=1).tolist()
    again = torch.stack(rounds, dim=1).tolist()
    # After the prompt each token counts once, even for a model that has no cache and runs them all again.
    seen = [step if index == 0 else [_last_row(p) for p in step] for index, step in enumerate(steps)]
    run = [torch.stack([((layers - p.skipped) * p.real).sum(dim=1) for p in step]).sum(dim=0) for step in seen]
    work = torch.stack(run, dim=1).tolist()
    rows: list[list[TokenDecision]] = []
    texts = []
    for b, ids in enumerate(new.tolist()):
        length = next((i for i, token in enumerate(ids) if token in ends), len(ids) - 1) + 1
        texts.append(loaded.tokenizer.decode(ids[:length], skip_special_tokens=True))
        rows.append(
            [
                TokenDecision(loaded.tokenizer.decode([ids[i]]), ids[i], skipped[b][i], exits[b][i], again[b][i])
                for i in range(length)
            ]
        )
    count = sum(map(len, rows))
    # What padding after an end did is nobody's.
    ran = [(work[b][0], sum(work[b][1 : len(row)])) for b, row in enumerate(rows)]
    dense = [(prompt * layers, (len(row) - 1) * layers) for prompt, row in zip(prompt_tokens, rows, strict=True)]
    ran_later, dense_later = sum(r[1] for r in ran), sum(d[1] for d in dense)
    prefill = sum(p.seconds for p in steps[0])
    decode = total - prefill
    everything = [t for row in rows for t in row]
    return Generated(
        texts=texts,
        tokens=rows,
        prompt_tokens=sum(prompt_tokens),
        new_tokens=count,
        prefill_seconds=prefill,
        decode_seconds=decode,
        tokens_per_second=count / total,
        decode_tokens_per_second=(count - len(rows)) / decode if count > len(rows) else 0.0,
        skip_ratio=1 - (sum(r[0] for r in ran) + ran_later) / max(1, sum(d[0] for d in dense) + dense_later),
        skip_ratio_decode=1 - ran_later / dense_later if dense_later else 0.0,
        average_exit_layer=sum(t.exit_layer for t in everything) / max(1, len(everything)),
        num_layers=layers,
        skip_ratios=[1 - sum(r) / max(1, sum(d)) for r, d in zip(ran, dense, strict=True)],
    )


def _last_row(done: Pass) -> Pass:
    return replace(
        done, skipped=done.skipped[:, -1:], exit_layer=done.exit_layer[:, -1:], real=done.real[:, -1:]
    )  # fmt: skip
