"""Quantized copies of a small model, packed by hand as GPTQ, AWQ, compressed-tensors and FP8 checkpoints are; random weights.

Each function rounds every linear layer of a folder's model, writes a checkpoint that vLLM reads, and, beside it, the rounded
weights in full precision: what they compute under Hugging Face is what the quantized ones should. Where vLLM itself rounds a
plain checkpoint while it loads (`ON_LOADING`), only the rounded weights are written. The GPU benchmark uses these as well.

    saved = int8(folder, tmp_path); saved.packed, saved.rounded; rounding_inputs(model, "int8")
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

GROUP = 32
"""Weights that share a scale, unless told otherwise: it divides the inner width of the tiny models."""
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("o_proj",), ("down_proj",))
"""Layers that vLLM makes one matrix of."""


class Saved(NamedTuple):
    packed: Path
    rounded: Path


def gptq(source: Path, to: Path, group: int = GROUP) -> Saved:
    def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes, scales = int4(weight, group)
        groups = scales.shape[1]
        return {
            "qweight": packed(codes.T.contiguous(), 0), "scales": scales.T.contiguous().bfloat16(),
            "qzeros": torch.full((groups, weight.shape[0] // 8), 0x77777777, dtype=torch.int32),  # zero - 1
            "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // group,
        }, dequantized(codes, scales.bfloat16().float())  # fmt: skip

    return write(
        source, to, pack, {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": False, "sym": True}
    )


def awq(source: Path, to: Path, group: int = GROUP) -> Saved:
    def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes, scales = int4(weight, group)
        zeros = torch.full((scales.shape[1], weight.shape[0]), 8)
        return {
            "qweight": packed(ordered(codes.T), 1), "scales": scales.T.contiguous().bfloat16(),
            "qzeros": packed(ordered(zeros), 1),
        }, dequantized(codes, scales.bfloat16().float())  # fmt: skip

    def ordered(values: Tensor) -> Tensor:
        return values.reshape(values.shape[0], -1, 8)[:, :, AWQ_ORDER].reshape(values.shape)

    return write(
        source, to, pack, {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    )


def int8(source: Path, to: Path) -> Saved:
    """compressed-tensors, int8 weights and int8 activations with a scale per token. Weights use seven of the eight bits: where
    a CPU multiplies bytes by AVX2, sums of two products of eight bits saturate, in vLLM as in whatever uses oneDNN."""

    def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scale = weight.abs().amax(1, keepdim=True) / 63
        codes = (weight / scale).round().clamp(-63, 63)
        return {"weight": codes.to(torch.int8), "weight_scale": scale}, codes * scale

    return write(source, to, pack, compressed("int-quantized", num_bits=8, type="int"))


def fp8(source: Path, to: Path) -> Saved:
    """compressed-tensors, float8 weights and activations."""

    def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scale = weight.abs().amax(1, keepdim=True) / 448
        codes = (weight / scale).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale": scale}, codes.float() * scale

    return write(source, to, pack, compressed("float-quantized", num_bits=8, type="float"))


def fp8_on_loading(source: Path, to: Path) -> Saved:
    """vLLM's `quantization="fp8"`: one scale for a whole matrix, fused ones included."""

    def rounded(name: str, weights: dict[str, Tensor]) -> Tensor:
        block, leaf = name.removesuffix(".weight").rsplit(".", 1)
        together = next(leaves for leaves in FUSED if leaf in leaves)
        scale = max(weights[f"{block}.{other}.weight"].float().abs().max() for other in together) / 448
        return (weights[name].float() / scale).to(torch.float8_e4m3fn).float() * scale

    return write_rounded(source, to, rounded)


def nf4_on_loading(source: Path, to: Path) -> Saved:
    """vLLM's `quantization="bitsandbytes"`, as its loader calls it. On the GPU if there is one."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def rounded(name: str, weights: dict[str, Tensor]) -> Tensor:
        codes, state = quantize_4bit(weights[name].to(device), compress_statistics=True, quant_type="nf4")
        return dequantize_4bit(codes, state).cpu()

    return write_rounded(source, to, rounded)


KINDS: dict[str, Callable[[Path, Path], Saved]] = {"gptq": gptq, "awq": awq, "int8": int8, "fp8": fp8}
ON_LOADING: dict[str, Callable[[Path, Path], Saved]] = {"fp8": fp8_on_loading, "bitsandbytes": nf4_on_loading}


def int8_inputs(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


def fp8_inputs(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 448
    return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale


INPUTS = {"int8": int8_inputs, "fp8": fp8_inputs}
"""What becomes of a linear layer's input, of the kinds that quantize it too."""


def rounding_inputs(model: nn.Module, kind: str) -> None:
    """Have the model's linear layers round their inputs as the quantized ones do."""
    rounded = INPUTS.get(kind)
    if rounded is None:
        return
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(lambda module, inputs: (rounded(inputs[0]),))


def compressed(form: str, **kind) -> dict:
    both = {"symmetric": True, **kind}
    group = {
        "targets": ["Linear"], "weights": {"strategy": "channel", "dynamic": False, **both},
        "input_activations": {"strategy": "token", "dynamic": True, **both},
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"], "quantization_status": "compressed",
        "config_groups": {"group_0": group},
    }  # fmt: skip


def int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(codes 0..15 around 8 [out, in], scales [out, groups])."""
    grouped = weight.reshape(weight.shape[0], -1, group)
    scales = grouped.abs().amax(-1) / 7
    codes = (grouped / scales.bfloat16().float().unsqueeze(-1)).round().clamp(-8, 7) + 8
    return codes.reshape(weight.shape).long(), scales


def dequantized(codes: Tensor, scales: Tensor) -> Tensor:
    return (codes - 8).float() * scales.repeat_interleave(codes.shape[1] // scales.shape[1], 1)


def packed(values: Tensor, dim: int) -> Tensor:
    """Eight 4-bit values to an int32, the first in the lowest bits."""
    parts = values.unflatten(dim, (-1, 8)).movedim(dim + 1, -1)
    total = (parts << (4 * torch.arange(8))).sum(-1)
    return torch.where(total >= 1 << 31, total - (1 << 32), total).to(torch.int32).contiguous()


def write(source: Path, to: Path, pack: Callable[[Tensor], tuple[dict[str, Tensor], Tensor]], config: dict) -> Saved:
    saved = Saved(to / "packed", to / "rounded")
    for folder in (saved.packed, saved.rounded):
        shutil.copytree(source, folder)
    weights = load_file(source / "model.safetensors")
    whole, quantized = dict(weights), dict(weights)
    for name, weight in weights.items():
        if not name.endswith("_proj.weight"):
            continue
        parts, rounded = pack(weight.float())
        whole[name] = rounded.to(weight.dtype)
        del quantized[name]
        quantized |= {name.removesuffix("weight") + part: value.contiguous() for part, value in parts.items()}
    save_file(whole, saved.rounded / "model.safetensors", {"format": "pt"})
    save_file(quantized, saved.packed / "model.safetensors", {"format": "pt"})
    path = saved.packed / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    return saved


def write_rounded(source: Path, to: Path, rounded: Callable[[str, dict[str, Tensor]], Tensor]) -> Saved:
    """`rounded(name, weights)`: what vLLM makes of a matrix while it loads the source."""
    saved = Saved(source, to / "rounded")
    shutil.copytree(source, saved.rounded)
    weights = load_file(source / "model.safetensors")
    whole = {
        name: rounded(name, weights).to(weight.dtype) if name.endswith("_proj.weight") else weight
        for name, weight in weights.items()
    }
    save_file(whole, saved.rounded / "model.safetensors", {"format": "pt"})
    return saved
