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
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sedac_cli.errors import InputError

# What transformers calls keys and values of earlier tokens: the first since 5.24, the others before.
CACHE_NAMES = ("cache", "past_key_values", "past_key_value")

# A sub-module whose forward takes one of these mixes tokens (attention, a state space); it is never skipped.
MIXER_ARGUMENTS = {
    "attention_mask", *CACHE_NAMES, "layer_past", "position_embeddings", "alibi", "cache_params", "rotary_pos_emb", "position_ids",
}  # fmt: skip

# What an MLP may be handed besides its input, row by row: the residual it adds inside (BLOOM, MPT), token ids to route by.
RESIDUAL = "residual"
ROW_ARGUMENTS = {RESIDUAL, "input_ids"}

# Config fields that scale the logits. Whether one multiplies or divides differs between families that share its name.
LOGIT_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "logits_mup_width_multiplier")


@dataclass(frozen=True)
class Branch:
    """The MLP of one layer. `entry` is called with its input and `exit` returns its output.

    Nearly always one module. Where a layer holds two bare linear maps (`fc1`, `fc2` of OPT), entry is the first, exit
    the last, and what lies between works row by row. `adds_residual`: the MLP is handed the residual and returns it with
    its own output added. A smaller block beside the MLP (a shared expert outside the experts' module) keeps running.
    """

    layer: int
    name: str
    entry: nn.Module
    exit: nn.Module
    adds_residual: bool = False


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
        """Where token ids go in, and where gates decide."""
        return _device_of(self.model.get_input_embeddings())

    def at_checkpoint(self, layer: int, see: Callable[[Tensor], None]) -> RemovableHandle:
        """Call `see(hidden [B, T, H])` with the state entering `layer` at every forward pass."""
        first = next(iter(inspect.signature(self.layers[layer].forward).parameters))

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs[first]
            if hidden.dim() != 3 or hidden.shape[-1] != self.hidden_size:
                raise InputError(
                    f"layer {layer} of {type(self.model).__name__} is entered by {list(hidden.shape)}, several streams "
                    f"and not one hidden state of width {self.hidden_size}: it has no checkpoint to read"
                )
            see(hidden)

        return self.layers[layer].register_forward_pre_hook(hook, with_kwargs=True)

    def at_mlp(self, layer: int, see: Callable[[Tensor], None]) -> RemovableHandle:
        """Call `see` with the input of the MLP of `layer` at every forward pass."""
        return self.branches[layer].entry.register_forward_pre_hook(lambda module, args: see(args[0]))

    def last_hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B, T, H]: what the output head reads; no logits are made."""
        return self._base(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state

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
        output = self.model.get_output_embeddings()
        return self._shape_logits(output(hidden.to(_device_of(output))), self.logit_scale)

    @cached_property
    def logit_scale(self) -> float:
        """What the family multiplies its logits by. Measured once, and only where the config names a scale."""
        config = self.model.config.get_text_config()
        named = [getattr(config, name, None) for name in LOGIT_SCALES]
        values = [float(v) for v in named if isinstance(v, int | float) and v not in (0, 1)]
        if not values:
            return 1.0
        with torch.inference_mode():
            ids, output = self._probe_ids(), self.model.get_output_embeddings()
            own = self.model(input_ids=ids, use_cache=False).logits.float()
            raw = output(self.last_hidden(ids).to(_device_of(output))).float().to(own.device)
        candidates = [1.0, *values, *(1 / v for v in values)]
        return min(candidates, key=lambda scale: float((self._shape_logits(raw, scale) - own).abs().max()))

    @torch.inference_mode()
    def check_head(self) -> None:
        """Refuse a model whose logits are not `head(last_hidden)`: every figure built on it would be wrong."""
        ids = self._probe_ids()
        own = self.model(input_ids=ids, use_cache=False).logits.float()
        ours = self.head(self.last_hidden(ids)).float()
        name = type(self.model).__name__
        if own.shape != ours.shape:
            raise InputError(f"{name} returns logits {list(own.shape)}, its output head makes {list(ours.shape)}")
        if not torch.allclose(own, ours.to(own.device), rtol=1e-2, atol=1e-2, equal_nan=True):
            raise InputError(
                f"the output head of {name} is not a linear map of the last hidden state "
                f"(logits differ by up to {(own - ours.to(own.device)).abs().max().item():.3g})"
            )

    @property
    def _base(self) -> nn.Module:
        """The part of the model that owns the layers; what the head reads comes out of it."""
        return next(child for child in self.model.children() if any(m is self.backbone for m in child.modules()))

    def _probe_ids(self) -> Tensor:
        return torch.arange(4, device=self.device).unsqueeze(0) % self.vocab_size

    def _shape_logits(self, logits: Tensor, scale: float) -> Tensor:
        if scale != 1.0:
            logits = logits * scale
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap


def find_decoder(model: Any) -> Decoder:
    """Name the parts of a model, or refuse it with its structure printed."""
    kind = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputError(f"{kind} is an encoder-decoder model; sedac gates decoder-only models\n{describe(model)}")
    config = model.config.get_text_config()
    for field in ("hidden_size", "vocab_size"):
        if not isinstance(getattr(config, field, None), int):
            raise InputError(f"the config of {kind} names no {field}: not one decoder over tokens\n{describe(model)}")
    expected = getattr(config, "decoder_layers", None) or getattr(config, "num_hidden_layers", None)
    backbone, layers = _find_layers(model, expected)
    names = {id(module): name for name, module in model.named_modules()}
    branches = tuple(_find_branch(i, layer, names[id(layer)]) for i, layer in enumerate(layers))
    return Decoder(
        model=model,
        backbone=backbone,
        layers=tuple(layers),
        branches=branches,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
    )


def _device_of(module: nn.Module) -> torch.device:
    """Where a module computes; weights that accelerate has offloaded lie on `meta`, its hook knows the real place."""
    hook = getattr(module, "_hf_hook", None)
    place = getattr(hook, "execution_device", None)
    if place is not None:
        return torch.device(place)
    return next(module.parameters()).device


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
    # A vision tower may have as many layers; the language model is the one that owns the token embeddings.
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    return max(exact, key=lambda pair: (any(m is embedding for m in pair[0].modules()), len(pair[1])))


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
            residual = _adds_residual(block, f"{name}.{label}", layer)
            return Branch(index, f"{name}.{label}", block, block, residual)
    elif len(named) == 2:
        (first, entry), (last, exit_) = named
        if getattr(entry, "in_features", 0) == getattr(exit_, "out_features", 0):
            return Branch(index, f"{name}.{first}..{last}", entry, exit_)
    raise InputError(f"cannot tell which part of decoder layer {index} is its MLP\n" + describe(layer))


def _adds_residual(block: nn.Module, name: str, layer: nn.Module) -> bool:
    """Whether the MLP is handed the residual; refuses one that is handed anything that cannot be packed by rows."""
    named = [
        p
        for p in inspect.signature(block.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    others = [p for p in named[1:] if p.name not in ROW_ARGUMENTS]
    if not named or any(p.default is p.empty or "Tensor" in str(p.annotation) for p in others):
        takes = ", ".join(p.name for p in named) or "no named input"
        raise InputError(
            f"{name} takes {takes}: an MLP that needs more than its own input rows cannot be skipped\n"
            + describe(layer)
        )
    return any(p.name == RESIDUAL for p in named[1:])


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
