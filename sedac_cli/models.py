"""Load a model the same way for every command, and know it again: built-in, local folder or hub id.

loaded = load_model("builtin:tiny")
loaded.decoder.num_layers      # 28
loaded.identity.architecture   # what probes and thresholds are checked against
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sedac_cli.artifacts.manifest import ModelIdentity
from sedac_cli.config import SHAPE, ModelSpec
from sedac_cli.errors import InputError, UsageError, did_you_mean
from sedac_cli.resources import data_dir
from sedac_cli.structure import Decoder, find_decoder

log = logging.getLogger("sedac")

BUILTIN = "builtin:"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# What makes two models the same architecture; read from the text part of the configuration.
ARCHITECTURE_KEYS = (
    "model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "num_experts", "num_local_experts",
)  # fmt: skip


@dataclass(frozen=True)
class LoadedModel:
    model: Any
    tokenizer: Any
    decoder: Decoder
    identity: ModelIdentity

    @property
    def device(self) -> torch.device:
        return self.decoder.device


def load_model(spec: ModelSpec | str) -> LoadedModel:
    """Model, tokenizer, named parts and identity; every failure says what to do next."""
    if isinstance(spec, str):
        spec = ModelSpec(ref=spec)
    device = pick_device(spec.device)
    if spec.ref.startswith(SHAPE):
        from sedac_cli.shapes import load_shape

        return load_shape(spec, device)
    path, is_hub = resolve(spec.ref)
    options = _load_options(spec, device)
    model = _from_pretrained("model", path, is_hub, spec, options)
    tokenizer = _from_pretrained("tokenizer", path, is_hub, spec, {})
    if not spec.device_map and not spec.load_in_4bit:
        model.to(device)
    model.eval()
    model.requires_grad_(False)
    return adopt_model(model, tokenizer, spec.ref)


def adopt_model(model: Any, tokenizer: Any, ref: str | None = None) -> LoadedModel:
    """A model that is already in memory, with its parts named; a tokenizer without a padding token gets one."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    decoder = find_decoder(model)
    ref = ref or getattr(model, "name_or_path", "") or type(model).__name__
    return LoadedModel(model, tokenizer, decoder, identify(ref, model, tokenizer, decoder))


def cached_tokenizer(model: Any) -> Any:
    """The tokenizer saved where a loaded model came from, if it is on this machine; otherwise None."""
    from transformers import AutoTokenizer

    origin = getattr(model, "name_or_path", "")
    if not origin:
        return None
    try:
        return AutoTokenizer.from_pretrained(origin, local_files_only=True)
    except (OSError, ValueError):
        return None


def resolve(ref: str) -> tuple[str, bool]:
    """The path or hub id behind a reference, and whether it is a hub id."""
    if ref.startswith(BUILTIN):
        name = ref.removeprefix(BUILTIN)
        folder = data_dir() / "models" / name
        if not folder.is_dir():
            known = ", ".join(BUILTIN + p.name for p in sorted((data_dir() / "models").iterdir()) if p.is_dir())
            raise InputError(f"there is no built-in model '{name}'", hint=f"built in: {known}")
        return str(folder), False
    path = Path(ref).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{path} holds no config.json: not a model folder")
        return str(path), False
    if path.exists() or ref.startswith((".", "/", "~")) or ref.count("/") > 1:
        raise InputError(f"no model folder at {ref}", hint="--model takes builtin:tiny, a folder, or a hub id")
    return ref, True


def pick_device(name: str) -> torch.device:
    """`auto` takes a GPU if there is one; a device asked for by name is never replaced."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device: '{name}' is not a device", hint="auto, cpu, cuda or cuda:1") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this machine has no usable GPU", hint="--device cpu, or see `sedac doctor`")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: there are {torch.cuda.device_count()} GPUs")
    return device


def named_dtype(name: str) -> torch.dtype | None:
    """None for `auto`."""
    if name != "auto" and name not in DTYPES:
        known = ["auto", *DTYPES]
        raise UsageError(f"--dtype: '{name}' is not known.{did_you_mean(name, known)}", hint=", ".join(known))
    return DTYPES.get(name)


def _load_options(spec: ModelSpec, device: torch.device) -> dict[str, Any]:
    dtype: Any = named_dtype(spec.dtype) or (torch.float32 if device.type == "cpu" else "auto")
    options: dict[str, Any] = {"dtype": dtype}
    if spec.load_in_4bit:
        from transformers import BitsAndBytesConfig

        compute = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
        )
        options["dtype"] = compute
        options["device_map"] = spec.device_map or {"": str(device)}
    elif spec.device_map:
        options["device_map"] = spec.device_map
    return options


def _from_pretrained(what: str, path: str, is_hub: bool, spec: ModelSpec, options: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    auto: Any = AutoModelForCausalLM if what == "model" else AutoTokenizer
    try:
        return auto.from_pretrained(path, revision=spec.revision, trust_remote_code=spec.trust_remote_code, **options)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise _explain(what, path, is_hub, error) from error
    except Exception as error:  # safetensors and tokenizers raise classes of their own for damaged files
        if type(error).__module__.split(".")[0] in {"safetensors_rust", "safetensors", "huggingface_hub", "httpx"}:
            raise _explain(what, path, is_hub, error) from error
        raise


def _explain(what: str, path: str, is_hub: bool, error: Exception) -> InputError:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    if "trust_remote_code" in str(error):
        return InputError(f"{path} brings its own Python code", hint="--trust-remote-code, if you trust its authors")
    if is_hub:
        return InputError(
            f"cannot get the {what} of '{path}' from the hub: {first}",
            hint="--model builtin:tiny needs no network; --model FOLDER takes a downloaded model",
        )
    return InputError(f"cannot load the {what} in {path}: {first}")


def identify(ref: str, model: Any, tokenizer: Any, decoder: Decoder) -> ModelIdentity:
    config = model.config.get_text_config()
    architecture = {key: getattr(config, key, None) for key in ARCHITECTURE_KEYS}
    quantized = getattr(model.config, "quantization_config", None) is not None
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False).encode()
    return ModelIdentity(
        ref=ref,
        revision=getattr(model.config, "_commit_hash", None),
        architecture=architecture,
        config_digest=hashlib.sha256(json.dumps(architecture, sort_keys=True).encode()).hexdigest(),
        tokenizer_digest=hashlib.sha256(vocabulary).hexdigest(),
        dtype=str(model.dtype).removeprefix("torch."),
        quantized=quantized,
        weights_sample=_sample_weights(decoder, matrices=False),
        matrix_sample=[] if quantized else _sample_weights(decoder, matrices=True),
    )


def _sample_weights(decoder: Decoder, matrices: bool) -> list[float]:
    """A few weights per depth: they tell two trainings of one architecture apart, in any precision."""
    sample: list[float] = []
    for index in sorted({0, decoder.num_layers // 2, decoder.num_layers - 1}):
        chosen = [p for p in decoder.layers[index].parameters() if (p.dim() >= 2) == matrices]
        for weights in chosen[:2]:
            sample.extend(float(x) for x in weights.detach().flatten()[:4].float().cpu())
    return sample
