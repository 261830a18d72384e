"""Find the decoder layers of a causal language model and the MLP of each, by structure and not by class name.

Always true: `Decoder.at_checkpoint(l, ...)` is the only definition of *checkpoint l*: the hidden state entering decoder
layer l, counted from 0, equal to `hidden_states[l]` of transformers. It governs the MLPs of layers l and deeper.

    decoder = find_decoder(model)
    decoder.branches[7].name       # 'model.layers.7.mlp'
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sedac_cli.errors import InputError

# A sub-module whose forward takes one of these mixes tokens (attention, a state space); it is never skipped.
MIXER_ARGUMENTS = {
    "attention_mask", "past_key_values", "past_key_value", "layer_past", "position_embeddings", "alibi",
    "cache_params", "rotary_pos_emb", "position_ids",
}  # fmt: skip


@dataclass(frozen=True)
class Branch:
    """The MLP of one layer. `entry` is called with its input and `exit` returns its output.

    Nearly always one module. Where a layer holds bare linear maps (`fc1`, `fc2` of OPT), entry is the first, exit the
    last, and what lies between works row by row.
    """

    layer: int
    name: str
    entry: nn.Module
    exit: nn.Module


@dataclass(frozen=True)
class Decoder:
    """A causal model with its parts named: `backbone` owns the layers, `branches[l]` is the MLP of layer l."""

    model: Any
    backbone: nn.Module
    layers: tuple[nn.Module, ...]
    branches: tuple[Branch, ...]
    hidden_size: int
    vocab_size: int

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return self.model.get_input_embeddings().weight.device

    def at_checkpoint(self, layer: int, see: Callable[[Tensor], None]) -> RemovableHandle:
        """Call `see(hidden [B, T, H])` with the state entering `layer` at every forward pass."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(args[0] if args else kwargs["hidden_states"])

        return self.layers[layer].register_forward_pre_hook(hook, with_kwargs=True)

    def at_mlp(self, layer: int, see: Callable[[Tensor], None]) -> RemovableHandle:
        """Call `see` with the input of the MLP of `layer` at every forward pass."""
        return self.branches[layer].entry.register_forward_pre_hook(lambda module, args: see(args[0]))

    def last_hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B, T, H]: what the output head reads; no logits are made."""
        base = getattr(self.model, self.model.base_model_prefix)
        return base(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state

    def final_norm(self, hidden: Tensor) -> Tensor:
        """What stands between the last layer and the output head; with `head`, the logit lens of any layer."""
        norms = [
            child
            for child in self.backbone.children()
            if not isinstance(child, nn.ModuleList) and not _weights(child) and any(True for _ in child.parameters())
        ]
        return norms[-1](hidden) if norms else hidden

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of hidden rows as the model itself would give them, soft caps and scales included."""
        config = self.model.config.get_text_config()
        output = self.model.get_output_embeddings()
        logits = output(hidden.to(output.weight.device))
        if getattr(config, "logit_scale", None) is not None:
            logits = logits * config.logit_scale
        if getattr(config, "logits_scaling", None) is not None:
            logits = logits / config.logits_scaling
        cap = getattr(config, "final_logit_softcapping", None)
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    @torch.inference_mode()
    def check_head(self) -> None:
        """Refuse a model whose logits are not `head(last_hidden)`: every figure built on it would be wrong."""
        ids = torch.arange(4, device=self.device).unsqueeze(0) % self.vocab_size
        own = self.model(input_ids=ids, use_cache=False).logits.float()
        ours = self.head(self.last_hidden(ids)).float()
        if not torch.allclose(own, ours.to(own.device), rtol=1e-2, atol=1e-2, equal_nan=True):
            raise InputError(
                f"the output head of {type(self.model).__name__} is not a linear map of the last hidden state "
                f"(logits differ by up to {(own - ours.to(own.device)).abs().max().item():.3g})"
            )


def find_decoder(model: Any) -> Decoder:
    """Name the parts of a model, or refuse it with its structure printed."""
    config = model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputError(f"{type(model).__name__} is an encoder-decoder model; sedac gates decoder-only models")
    backbone, layers = _find_layers(model, getattr(config, "num_hidden_layers", None))
    names = {id(module): name for name, module in model.named_modules()}
    branches = tuple(_find_branch(i, layer, names[id(layer)]) for i, layer in enumerate(layers))
    return Decoder(
        model=model,
        backbone=backbone,
        layers=tuple(layers),
        branches=branches,
        hidden_size=int(config.hidden_size),
        vocab_size=int(config.vocab_size),
    )


def _find_layers(model: nn.Module, expected: int | None) -> tuple[nn.Module, list[nn.Module]]:
    found = []
    for owner in model.modules():
        for child in owner.children():
            if isinstance(child, nn.ModuleList) and len(child) and all(_has_mixer(layer) for layer in child):
                found.append((owner, list(child)))
    exact = [pair for pair in found if expected is None or len(pair[1]) == expected]
    if not exact:
        counts = ", ".join(str(len(layers)) for _, layers in found) or "none"
        raise InputError(
            f"no list of {expected} decoder layers in {type(model).__name__} (lists with attention found: {counts})\n"
            + describe(model)
        )
    return max(exact, key=lambda pair: len(pair[1]))


def _is_mixer(module: nn.Module) -> bool:
    return bool(MIXER_ARGUMENTS & set(inspect.signature(module.forward).parameters))


def _has_mixer(layer: nn.Module) -> bool:
    return any(_is_mixer(child) for child in layer.children())


def _weights(module: nn.Module) -> int:
    """Entries of its matrices; norms and biases do not count."""
    return sum(p.numel() for p in module.parameters() if p.dim() >= 2)


def _find_branch(index: int, layer: nn.Module, name: str) -> Branch:
    named = [(n, c) for n, c in layer.named_children() if not _is_mixer(c) and _weights(c)]
    blocks = [(n, c) for n, c in named if any(True for _ in c.children())]
    if blocks:
        label, block = max(blocks, key=lambda pair: _weights(pair[1]))
        rest = sum(_weights(c) for _, c in named) - _weights(block)
        if rest <= _weights(block) / 2:
            _check_signature(block, f"{name}.{label}", layer)
            return Branch(index, f"{name}.{label}", block, block)
    elif len(named) >= 2:
        (first, entry), (last, exit_) = named[0], named[-1]
        return Branch(index, f"{name}.{first}..{last}", entry, exit_)
    raise InputError(f"cannot tell which part of decoder layer {index} is its MLP\n" + describe(layer))


def _check_signature(block: nn.Module, name: str, layer: nn.Module) -> None:
    needed = [
        p.name
        for p in inspect.signature(block.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(needed) != 1:
        raise InputError(
            f"{name} takes {', '.join(needed)}: an MLP that needs more than its input rows cannot be skipped\n"
            + describe(layer)
        )


def describe(module: nn.Module, depth: int = 2) -> str:
    """The module tree to a small depth, repeated layers once: what an error shows of a model it cannot gate."""
    lines = [type(module).__name__]

    def walk(parent: nn.Module, level: int) -> None:
        shown: set[str] = set()
        for name, child in parent.named_children():
            kind = type(child).__name__
            if name.isdigit() and kind in shown:
                continue
            shown.add(kind)
            lines.append("  " * level + f"{name}: {kind} ({_weights(child):,} weights)")
            if level < depth + 1:
                walk(child, level + 1)

    walk(module, 1)
    return "\n".join(lines)
