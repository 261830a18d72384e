"""Models with the shape of well-known ones and random weights: speed can be measured where no weights are, quality cannot.

Whatever is measured with one is labelled as such: its `ref` begins with `shape:` and its texts mean nothing.

    loaded = shaped_model("qwen2.5-7b", device="cuda")
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from sedac_cli.config import SHAPE, ModelSpec
from sedac_cli.errors import InputError, UsageError, did_you_mean
from sedac_cli.models import LoadedModel, identify, named_dtype
from sedac_cli.structure import find_decoder

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2.5-0.5b": ("qwen2", {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    }),
    "qwen2.5-3b": ("qwen2", {
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    }),
    "qwen2.5-7b": ("qwen2", {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    }),
    "qwen3-8b": ("qwen3", {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
    }),
    "llama-3.1-8b": ("llama", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    }),
}  # fmt: skip


def load_shape(spec: ModelSpec, device: torch.device) -> LoadedModel:
    """`shape:NAME` as `load_model` has it; options about the files of a model are refused, for there are none."""
    given = {
        "--revision": spec.revision, "--device-map": spec.device_map, "--load-in-4bit": spec.load_in_4bit,
        "--trust-remote-code": spec.trust_remote_code,
    }  # fmt: skip
    for option, value in given.items():
        if value:
            raise UsageError(
                f"{option} is about the files of a model; {spec.ref} has random weights", hint="leave it out"
            )
    dtype = named_dtype(spec.dtype) or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    return shaped_model(spec.ref.removeprefix(SHAPE), device, dtype)


def shaped_model(
    name: str, device: torch.device | str, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> LoadedModel:
    """Weights are normal with the deviation that keeps states of unit size; the tokenizer is one token per number."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if name not in SHAPES:
        raise UsageError(f"no shape '{name}'.{did_you_mean(name, list(SHAPES))}", hint=f"known: {', '.join(SHAPES)}")
    family, values = SHAPES[name]
    config = AutoConfig.for_model(family, **values | {"max_position_embeddings": 32768} | changes)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    _require_room(name, model, torch.device(device))
    model.to_empty(device=device)
    for path, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            parameter.data.normal_(0.0, parameter.shape[-1] ** -0.5)
        else:
            parameter.data.fill_(1.0 if "norm" in path else 0.0)
    for module in model.modules():
        if hasattr(module, "inv_freq") and hasattr(module, "config"):  # not a parameter, so `to_empty` left it unset
            fresh = type(module)(config=module.config).to(device)
            module.inv_freq, module.original_inv_freq = fresh.inv_freq, fresh.inv_freq.clone()
    model.tie_weights()
    model.eval().requires_grad_(False)
    decoder = find_decoder(model)
    tokenizer = _numbers(config.vocab_size)
    return LoadedModel(model, tokenizer, decoder, identify(SHAPE + name, model, tokenizer, decoder))


def _require_room(name: str, model: Any, device: torch.device) -> None:
    """A GPU says when its memory is full; a process that fills the host's is killed without a word."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if device.type == "cpu" and size > (free := _free_memory()):
        raise InputError(
            f"shape {name} in {str(model.dtype).removeprefix('torch.')} takes {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of "
            "memory are free",
            hint="a GPU, a smaller shape, or --dtype bfloat16",
        )


def _free_memory() -> int:
    """Bytes that may be had without swapping, caches that would make room counted in."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _numbers(vocabulary: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(vocabulary)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="0")
