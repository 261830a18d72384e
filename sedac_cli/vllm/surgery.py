"""Find, in a model that vLLM has built, the decoder layers and the MLP of each, by structure; or refuse the model by name.

What is looked for: one list of as many layers as the configuration names, each with one part that attends (it holds one of
vLLM's attention layers) and one block of linear layers that takes rows and returns rows. A layer that is handed a residual
adds it to its input at its first norm, so the state entering it, as Hugging Face sees it, is the sum of the two.

    layers = find_layers(model, num_layers=28)
    layers[7].mlp
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from torch import nn

from sedac_cli.errors import InputError
from sedac_cli.structure import describe

STREAM, RESIDUAL = "hidden_states", "residual"


@dataclass(frozen=True)
class Layer:
    """One decoder layer of this worker. `stream` and `residual` are where its forward takes them, counted without self."""

    index: int
    module: nn.Module
    mlp: nn.Module
    stream: int
    residual: int | None


def find_layers(model: nn.Module, num_layers: int) -> list[Layer]:
    name = type(model).__name__
    lists = [
        child
        for child in model.modules()
        if isinstance(child, nn.ModuleList) and len(child) == num_layers and any(_attends(layer) for layer in child)
    ]
    if len(lists) != 1:
        raise InputError(
            f"sedac cannot gate {name}: {len(lists)} lists of {num_layers} decoder layers\n" + describe(model, depth=3)
        )
    present = [(i, layer) for i, layer in enumerate(lists[0]) if any(True for _ in layer.parameters())]
    return [_layer(index, layer, name) for index, layer in present]


def _layer(index: int, layer: nn.Module, model: str) -> Layer:
    takes = list(inspect.signature(layer.forward).parameters)
    if STREAM not in takes:
        raise InputError(f"sedac cannot gate {model}: layer {index} takes {', '.join(takes)}, not {STREAM}")
    blocks = [(n, c) for n, c in layer.named_children() if not _attends(c) and _multiplies(c)]
    if not _attends(layer) or len(blocks) != 1:
        found = ", ".join(n for n, _ in blocks) or "none"
        raise InputError(
            f"sedac cannot gate {model}: layer {index} has not one attention and one MLP (blocks beside it: {found})\n"
            + describe(layer)
        )
    label, mlp = blocks[0]
    if any("MoE" in type(m).__name__ or "Experts" in type(m).__name__ for m in mlp.modules()):
        raise InputError(
            f"sedac cannot gate {model}: {label} of layer {index} is a mixture of experts ({type(mlp).__name__})"
        )
    rows = [p for p in inspect.signature(mlp.forward).parameters.values() if p.default is p.empty]
    if len(rows) != 1:
        raise InputError(
            f"sedac cannot gate {model}: {label} of layer {index} takes {', '.join(p.name for p in rows)}, not rows alone"
        )
    return Layer(index, layer, mlp, takes.index(STREAM), takes.index(RESIDUAL) if RESIDUAL in takes else None)


def _attends(module: nn.Module) -> bool:
    return any(hasattr(m, "get_kv_cache_spec") for m in module.modules())


def _multiplies(module: nn.Module) -> bool:
    """Whether a block holds linear layers. Their weights may be packed out of sight, so the class tells: vLLM's own base."""
    return any(
        kind.__name__ == "LinearBase"
        for child in module.children()
        for m in child.modules()
        for kind in type(m).__mro__
    )


def adapted(mlp: nn.Module) -> bool:
    """Whether adapters (LoRA) hang on an MLP: they find a row's adapter by the row's place in the step, so no row may move."""
    return any(kind.__name__ == "BaseLayerWithLoRA" for m in mlp.modules() for kind in type(m).__mro__)
