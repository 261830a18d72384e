"""FLOPs per token of every part of a model, so that savings are a share of the whole and not of the skipped part.

A multiply-add counts 2. Norms and activations are left out: they are under a percent. Mixture-of-experts blocks count
the experts a token visits.

    costs = model_costs(decoder, context=512)
    costs.saved(skip_rates=[0.0] * 14 + [0.5] * 14)      # share of the whole model's work
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from sedac_cli.structure import Decoder


@dataclass(frozen=True)
class Costs:
    """`mlp[l]` and `mixer[l]` per layer, `head` once; FLOPs per token."""

    mlp: tuple[float, ...]
    mixer: tuple[float, ...]
    head: float

    @property
    def total(self) -> float:
        return sum(self.mlp) + sum(self.mixer) + self.head

    def whole(self, layers: tuple[int, ...]) -> Costs:
        """Where a token that skips one of these layers skips its attention too."""
        mlp = tuple(m + (x if i in layers else 0.0) for i, (m, x) in enumerate(zip(self.mlp, self.mixer, strict=True)))
        return Costs(mlp, tuple(0.0 if i in layers else x for i, x in enumerate(self.mixer)), self.head)

    def saved(
        self, skip_rates: list[float], gate: dict[int, float] | None = None, standin: list[float] | None = None
    ) -> float:
        """Share of the model's FLOPs saved when layer l skips `skip_rates[l]` of its tokens; deciding and stand-ins
        (paid for skipped tokens) count as cost."""
        gained = sum(rate * flops for rate, flops in zip(skip_rates, self.mlp, strict=True))
        paid = sum((gate or {}).values())
        paid += sum(rate * flops for rate, flops in zip(skip_rates, standin or [0.0] * len(self.mlp), strict=True))
        return (gained - paid) / self.total


def model_costs(decoder: Decoder, context: int) -> Costs:
    """Costs at a context of `context` tokens: a causal token attends to half of them on average."""
    config = decoder.model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0) or 0
    head_dim = getattr(config, "head_dim", None) or decoder.hidden_size // max(heads, 1)
    scores = 2 * 2 * heads * head_dim * context / 2
    mlp, mixer = [], []
    for layer, branch in zip(decoder.layers, decoder.branches, strict=True):
        inside = {id(m) for part in (branch.entry, branch.exit) for m in part.modules()}
        own = branch_flops(branch.entry, config)
        if branch.exit is not branch.entry:
            own += branch_flops(branch.exit, config)
        mlp.append(own)
        mixer.append(scores + sum(_matrix_flops(m) for m in layer.modules() if id(m) not in inside))
    output = decoder.model.get_output_embeddings()
    return Costs(tuple(mlp), tuple(mixer), _matrix_flops(output))


def branch_flops(module: nn.Module, config: object) -> float:
    """FLOPs per token of one MLP; of the experts only those a token visits."""
    total = 0.0
    for name, child in module.named_modules():
        flops = _matrix_flops(child)
        if flops and "experts" in name.split(".") and "shared" not in name:
            flops *= visited_share(config)
        total += flops
    return total


def visited_share(config: object) -> float:
    chosen = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_topk", None) or 1
    of = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    of = of or getattr(config, "n_routed_experts", None) or chosen
    return chosen / of


def _matrix_flops(module: nn.Module) -> float:
    """2 x entries of the matrices a module holds itself; quantized weights count as what they stand for."""
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(inputs, int) and isinstance(outputs, int):
        return 2.0 * inputs * outputs
    return float(sum(2 * p.numel() for p in module.parameters(recurse=False) if p.dim() >= 2))
