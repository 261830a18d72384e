"""Generate text with a gate in force, and keep what was decided for every token.

result = generate(loaded, gate, ["The sea was"], GenerateOptions(max_new_tokens=32))
result.texts[0], result.skip_ratio, result.tokens_per_second
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sedac_cli.errors import InputError
from sedac_cli.gates.base import Gate
from sedac_cli.models import LoadedModel
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
    """A generated token and what the pass that produced it skipped."""

    text: str
    token: int
    skipped: int
    exit_layer: int


@dataclass(frozen=True)
class Generated:
    """Rates count generated tokens of all prompts; `decode_*` leaves the prompt pass out."""

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


@torch.inference_mode()
def generate(
    loaded: LoadedModel,
    gate: Gate,
    prompts: list[str],
    options: GenerateOptions,
    standin: StandIn | None = None,
    on_pass: Callable[[Pass], None] | None = None,
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
    with skipping(loaded.model, gate, standin, decoder=loaded.decoder, keep_passes=True, on_pass=on_pass) as run:
        began = time.perf_counter()
        out = loaded.model.generate(
            **inputs, max_new_tokens=options.max_new_tokens, pad_token_id=loaded.tokenizer.pad_token_id, **sampling
        )
        if out.is_cuda:
            torch.cuda.synchronize()
        total = time.perf_counter() - began
    new = out[:, width:]
    return _describe(loaded, run.passes, new, end_tokens(loaded, options), int(inputs["attention_mask"].sum()), total)


def check_room(loaded: LoadedModel, prompt: int, new_tokens: int) -> None:
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if limit and prompt + new_tokens > limit:
        raise InputError(
            f"a prompt of {prompt} tokens and {new_tokens} new ones exceed the model's {limit} positions",
            hint=f"--max-new-tokens {max(1, limit - prompt)} or a shorter prompt",
        )


def end_tokens(loaded: LoadedModel, options: GenerateOptions) -> set[int]:
    """Tokens that end a text."""
    return set() if options.ignore_eos else set(_as_list(loaded.model.generation_config.eos_token_id))


def encode_prompts(loaded: LoadedModel, prompts: list[str], options: GenerateOptions) -> dict[str, torch.Tensor]:
    """Left-padded ids and mask; through the model's chat template when asked for."""
    tokenizer = loaded.tokenizer
    if options.chat:
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(f"{loaded.identity.ref} has no chat template", hint="leave --chat out")
        prompts = [
            tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
            for p in prompts
        ]
    if not prompts or any(not p for p in prompts):
        raise InputError("an empty prompt: there is nothing to continue")
    # A chat template writes the special tokens itself.
    encoded = tokenizer(
        prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=not options.chat
    )
    if not encoded["attention_mask"].any(dim=1).all():
        raise InputError("a prompt without a single token: there is nothing to continue")
    return {key: encoded[key].to(loaded.device) for key in ("input_ids", "attention_mask")}


def _describe(
    loaded: LoadedModel, passes: list[Pass], new: torch.Tensor, ends: set[int], prompt_tokens: int, total: float
) -> Generated:
    layers = loaded.decoder.num_layers
    skipped = torch.stack([p.skipped[:, -1] for p in passes], dim=1)[:, : new.shape[1]].cpu()
    exits = torch.stack([p.exit_layer[:, -1] for p in passes], dim=1)[:, : new.shape[1]].cpu()
    rows: list[list[TokenDecision]] = []
    texts = []
    for b, ids in enumerate(new.tolist()):
        length = next((i for i, token in enumerate(ids) if token in ends), len(ids) - 1) + 1
        texts.append(loaded.tokenizer.decode(ids[:length], skip_special_tokens=True))
        rows.append(
            [
                TokenDecision(loaded.tokenizer.decode([ids[i]]), ids[i], int(skipped[b, i]), int(exits[b, i]))
                for i in range(length)
            ]
        )
    count = sum(map(len, rows))
    prefill = passes[0].seconds
    decode = total - prefill
    after = [t for row in rows for t in row[1:]]
    everything = [t for row in rows for t in row]
    skipped_later = sum(t.skipped for t in after)  # what padding after an end did is nobody's
    skipped_all = int(passes[0].skipped[passes[0].real].sum()) + skipped_later
    return Generated(
        texts=texts,
        tokens=rows,
        prompt_tokens=prompt_tokens,
        new_tokens=count,
        prefill_seconds=prefill,
        decode_seconds=decode,
        tokens_per_second=count / total,
        decode_tokens_per_second=len(after) / decode if after else 0.0,
        skip_ratio=skipped_all / max(1, (prompt_tokens + len(after)) * layers),
        skip_ratio_decode=skipped_later / max(1, len(after) * layers),
        average_exit_layer=sum(t.exit_layer for t in everything) / max(1, len(everything)),
        num_layers=layers,
    )


def _as_list(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
