"""Recognise the decoder layer that most families share, by structure: RMSNorm, attention with rotary positions, RMSNorm, gated MLP.

What is recognised can be run by the decode kernels; whether the kernels then compute what the model computes is not believed
but measured (`engine.py` compares logits). Everything else says why it is not this layer, and runs through the model's own
code.

    standard = standard_model(decoder)       # or NotStandardError, with the reason
    check_kernels(standard, decoder)         # that it lies in memory as the kernels, not only their twins, read it
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sedac_cli.gpu.decode import Heads
from sedac_cli.structure import Decoder


class NotStandardError(Exception):
    """Why a model's layers are not the standard one."""


@dataclass(frozen=True)
class Norm:
    """An RMSNorm. `plus_one`: its weight is stored less one, and applied before rounding."""

    weight: Tensor
    eps: float
    plus_one: bool = False


@dataclass(frozen=True)
class Linear:
    """Up to three matrices whose outputs stand side by side."""

    weights: list[Tensor]
    biases: list[Tensor | None]


@dataclass(frozen=True)
class Layer:
    norm: Norm
    qkv: Linear
    heads: Heads
    head_norms: tuple[Norm, Norm] | None
    out: Linear
    mlp_norm: Norm
    gate: Tensor
    up: Tensor
    mlp_biases: tuple[Tensor, Tensor] | None
    activation: str
    down: Linear


@dataclass(frozen=True)
class Standard:
    """A whole model of standard layers."""

    layers: list[Layer]
    norm: Norm
    rotary: nn.Module = field(repr=False)


def standard_model(decoder: Decoder) -> Standard:
    backbone: Any = decoder.backbone
    rotary = getattr(backbone, "rotary_emb", None)
    if not isinstance(rotary, nn.Module):
        raise NotStandardError("its rotary positions are not made in one place")
    norm = getattr(backbone, "norm", None)
    if norm is None:
        raise NotStandardError("it has no final norm")
    size = _rotary_size(rotary, decoder)
    windows = windows_of(decoder)
    layers = [_layer(module, index, size, windows[index]) for index, module in enumerate(decoder.layers)]
    return Standard(layers, _norm(norm, "the final norm"), rotary)


def check_kernels(standard: Standard, decoder: Decoder) -> None:
    dtype, device = decoder.model.dtype, decoder.device
    if dtype not in (torch.float16, torch.bfloat16):
        raise NotStandardError("the decode kernels read float16 and bfloat16 weights")
    head = decoder.model.get_output_embeddings()
    maps = [Linear([head.weight], [head.bias])] if type(head) is nn.Linear else []
    norms = [standard.norm]
    for layer in standard.layers:
        maps += [layer.qkv, layer.out, Linear([layer.gate, layer.up], list(layer.mlp_biases or [])), layer.down]
        norms += [layer.norm, layer.mlp_norm, *(layer.head_norms or ())]
    weights = [weight for linear in maps for weight in linear.weights]
    biases = [bias for linear in maps for bias in linear.biases if bias is not None]
    embedding = decoder.model.get_input_embeddings().weight
    for tensor in (embedding, *weights, *biases, *(norm.weight for norm in norms)):
        if tensor.dtype != dtype or tensor.device != device:
            raise NotStandardError(
                f"the decode kernels read weights of one kind: {dtype} on {device}, here {tensor.dtype} on {tensor.device}"
            )
    for weight in weights:
        if weight.shape[1] % 8 or not weight.is_contiguous():
            raise NotStandardError(
                f"the decode kernels read dense rows whose width is divisible by 8, here {weight.shape[1]}"
            )


def windows_of(decoder: Decoder) -> list[int]:
    """How far back each layer attends, 0 for all the way: as transformers itself makes the model's cache."""
    from transformers import DynamicCache

    layers = DynamicCache(config=decoder.model.config).layers
    if len(layers) != decoder.num_layers:
        return [0] * decoder.num_layers
    return [int(getattr(layer, "sliding_window", None) or 0) for layer in layers]


def _rotary_size(rotary: Any, decoder: Decoder) -> int:
    probe = torch.zeros(1, 1, decoder.hidden_size, device=decoder.device)
    try:
        cos, sin = rotary(probe, torch.zeros(1, 1, dtype=torch.long, device=decoder.device))
    except Exception as error:
        raise NotStandardError(f"its rotary positions take other arguments ({error})") from None
    if cos.shape[:-1] != (1, 1) or sin.shape != cos.shape:
        raise NotStandardError(f"its rotary positions have shape {tuple(cos.shape)}")
    return cos.shape[-1]


def _layer(module: Any, index: int, rotary: int, window: int) -> Layer:
    children = {
        name: child for name, child in module.named_children() if not isinstance(child, nn.Dropout | nn.Identity)
    }
    wanted = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    if set(children) != wanted:
        raise NotStandardError(f"layer {index} consists of {', '.join(children)}, not of {', '.join(sorted(wanted))}")
    attention, mlp = children["self_attn"], children["mlp"]
    qkv = _qkv(attention)
    heads, head_norms = _heads(attention, qkv, rotary, window)
    out = _linear(_part(attention, "o_proj", "attention"))
    gate, up, biases = _gate_up(mlp)
    return Layer(
        norm=_norm(children["input_layernorm"], "input_layernorm"),
        qkv=qkv,
        heads=heads,
        head_norms=head_norms,
        out=out,
        mlp_norm=_norm(children["post_attention_layernorm"], "post_attention_layernorm"),
        gate=gate,
        up=up,
        mlp_biases=biases,
        activation=activation_of(mlp),
        down=_linear(_part(mlp, "down_proj", "MLP")),
    )


def _part(module: nn.Module, name: str, what: str) -> nn.Module:
    part = getattr(module, name, None)
    if part is None:
        raise NotStandardError(f"its {what} has no {name}")
    return part


def _linear(*modules: nn.Module) -> Linear:
    for module in modules:
        if type(module) is not nn.Linear:
            raise NotStandardError(f"a {type(module).__name__} stands where a plain linear map would (quantized?)")
    return Linear([m.weight for m in modules], [m.bias for m in modules])  # type: ignore[misc]


def _qkv(attention: Any) -> Linear:
    if hasattr(attention, "qkv_proj"):
        return _linear(attention.qkv_proj)
    return _linear(*(_part(attention, name, "attention") for name in ("q_proj", "k_proj", "v_proj")))


def _heads(attention: Any, qkv: Linear, rotary: int, window: int) -> tuple[Heads, tuple[Norm, Norm] | None]:
    known = {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm"}
    strange = {name for name, child in attention.named_children() if any(True for _ in child.parameters())} - known
    strange |= {name for name, _ in attention.named_parameters(recurse=False)}
    if strange:
        raise NotStandardError(f"its attention holds {', '.join(sorted(strange))}")
    size = getattr(attention, "head_dim", None)
    config = getattr(attention, "config", None)
    if not isinstance(size, int) or config is None:
        raise NotStandardError("its attention names no head size")
    query = config.num_attention_heads
    key = getattr(config, "num_key_value_heads", None) or query
    rows = sum(w.shape[0] for w in qkv.weights)
    if rows != (query + 2 * key) * size:
        raise NotStandardError(
            f"q, k and v have {rows} rows where {query} + 2 x {key} heads of {size} have {(query + 2 * key) * size}"
        )
    norms = None
    if getattr(attention, "q_norm", None) is not None:
        norms = (_norm(attention.q_norm, "q_norm"), _norm(_part(attention, "k_norm", "attention"), "k_norm"))
        if (
            norms[0].weight.shape != (size,)
            or norms[1].weight.shape != (size,)
            or norms[0].plus_one
            or norms[1].plus_one
        ):
            raise NotStandardError("its norms of q and k are not one RMSNorm per head")
    heads = Heads(
        query, key, size, rotary, float(getattr(attention, "scaling", size**-0.5)), window=window,
        softcap=getattr(attention, "attn_logit_softcapping", None) or 0.0,
    )  # fmt: skip
    if reason := heads.why_not():
        raise NotStandardError(reason)
    return heads, norms


def _gate_up(mlp: Any) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    if hasattr(mlp, "gate_up_proj"):
        both = _linear(mlp.gate_up_proj)
        gate, up = both.weights[0].chunk(2, dim=0)
        if both.biases[0] is not None:
            raise NotStandardError("its gate and up projections share a bias")
        return gate, up, None
    both = _linear(_part(mlp, "gate_proj", "MLP"), _part(mlp, "up_proj", "MLP"))
    first, second = both.biases
    return (*both.weights, None if first is None or second is None else (first, second))  # type: ignore[return-value]


def activation_of(mlp: Any) -> str:
    function = getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)
    if function is None:
        raise NotStandardError("its MLP names no activation")
    x = torch.linspace(-6, 6, 64)
    known = {
        "silu": functional.silu(x), "gelu": functional.gelu(x), "gelu_tanh": functional.gelu(x, approximate="tanh"),
    }  # fmt: skip
    try:
        y = function(x)
    except Exception as error:  # one with parameters of its own, on a device of its own
        raise NotStandardError(f"its activation {type(function).__name__} is more than a function ({error})") from None
    for name, expected in known.items():
        if torch.allclose(y, expected, atol=1e-6):
            return name
    raise NotStandardError(f"its activation {type(function).__name__} is none of {', '.join(known)}")


def _norm(module: Any, what: str) -> Norm:
    """By what it computes: rounded before or after its weight makes a difference in bf16, a bias or a mean a large one."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or not isinstance(eps, float) or getattr(module, "bias", None) is not None:
        raise NotStandardError(f"{what} is a {type(module).__name__}, not an RMSNorm")
    x = torch.randn(4, weight.shape[0], device=weight.device, generator=torch.Generator(weight.device).manual_seed(1))
    normal = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    found = module(x.to(weight.dtype)).float()
    tolerance = 1e-4 if weight.dtype == torch.float32 else 0.05
    made = {plus_one: normal * (weight.float() + plus_one) for plus_one in (False, True)}
    nearer = min(made, key=lambda plus_one: float((found - made[plus_one]).norm()))  # large weights: both may be near
    if torch.allclose(found, made[nearer], rtol=tolerance, atol=tolerance):
        return Norm(weight, eps, nearer)
    raise NotStandardError(f"{what}, a {type(module).__name__}, does not compute an RMSNorm")
