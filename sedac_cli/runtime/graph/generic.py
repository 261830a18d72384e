"""A decode step through the model's own code, for any family: its forward on one token, over a cache of fixed size.

MLPs hang on conditional nodes (on a CPU, on a branch); attention is the model's own. Slower than the decode kernels, and
right wherever the model's forward can be captured at all.

    step = GenericStep(loaded, plan.standin, cache, program)
    logits = step(state)
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from sedac_cli.errors import InputError
from sedac_cli.models import LoadedModel
from sedac_cli.runtime.graph.branches import Branches
from sedac_cli.runtime.graph.capture import EAGER
from sedac_cli.runtime.graph.programs import Program
from sedac_cli.runtime.graph.state import KVCache, State
from sedac_cli.runtime.past import handing
from sedac_cli.standins import StandIn, ZeroStandIn
from sedac_cli.standins.lowrank import LowRankStandIns
from sedac_cli.structure import Branch


class SlotCache(Cache):
    """The cache as the model's code sees it: an update writes at `slot` and returns all places."""

    def __init__(self, cache: KVCache, slot: Tensor):
        self.kept, self.slot = cache, slot
        self.layers: list[Any] = []
        self.layer_class_to_replicate = None
        self.offloading = False

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        keys, values = self.kept.layers[layer_idx]
        keys.index_copy_(2, self.slot, key_states)
        values.index_copy_(2, self.slot, value_states)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.kept.places - 1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return self.kept.places

    def __len__(self) -> int:
        return len(self.kept.layers)


class GenericStep:
    def __init__(self, loaded: LoadedModel, standin: StandIn, cache: KVCache, program: Program):
        self.loaded, self.standin, self.cache, self.program = loaded, standin, cache, program
        self.device = loaded.device
        self.dtype = loaded.model.get_input_embeddings().weight.dtype
        self.either = Branches(self.device)
        self.positions = "position_ids" in inspect.signature(loaded.model.forward).parameters
        self.extras = parts_beside_rows(loaded, program)

    def __call__(self, state: State) -> Tensor:
        saved, handles = self._install()
        try:
            self.program.begin(state.position, ~state.finished)
            place = torch.arange(self.cache.places, device=self.device)
            seen = (place >= state.first.unsqueeze(1)) & (place <= state.slot)
            mask = torch.where(seen, 0.0, torch.finfo(self.dtype).min).to(self.dtype)[:, None, None]
            given = {"position_ids": state.position.unsqueeze(1)} if self.positions else {}
            output = self.loaded.model(
                input_ids=state.tokens.unsqueeze(1), attention_mask=mask,
                use_cache=True, **handing(self.loaded.model, SlotCache(self.cache, state.slot)), **given,
            )  # fmt: skip
        finally:
            for handle in handles:
                handle.remove()
            for module, forward in saved:
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward
        return output.logits[:, -1]

    def _install(self) -> tuple[list[tuple[nn.Module, Any]], list[Any]]:
        decoder, program = self.loaded.decoder, self.program
        saved: list[tuple[nn.Module, Any]] = []
        handles = []
        for layer, module in enumerate(decoder.layers):
            if any(source >= 0 for source in program.source):
                handles.append(
                    decoder.at_checkpoint(layer, lambda h, layer=layer: program.enter(layer, h.flatten(0, -2)))  # type: ignore[misc]
                )
            if program.source[layer] < 0:
                continue
            branch = decoder.branches[layer]
            for part, make in self._parts(branch):
                saved.append((part, part.__dict__.get("forward")))
                part.forward = functools.update_wrapper(make(part.forward), part.forward)  # type: ignore[method-assign, arg-type]
            del module
        return saved, handles

    def _parts(self, branch: Branch) -> list[tuple[nn.Module, Callable[[Any], Any]]]:
        if branch.entry is branch.exit:
            return [(branch.entry, lambda forward: self._whole(branch.layer, forward))]
        memory: dict[str, Tensor] = {}
        size = branch.entry.out_features  # type: ignore[union-attr]

        def enter(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            def run(x: Tensor) -> Tensor:
                need = self.program.decide_on(branch.layer, x.flatten(0, -2))
                assert need is not None
                memory["x"], memory["need"] = x, need
                out = x.new_zeros(*x.shape[:-1], int(size))  # type: ignore[arg-type]
                self.either(need, lambda: out.copy_(forward(x)), None)
                return out

            return run

        def leave(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            def run(z: Tensor) -> Tensor:
                x, need = memory["x"], memory["need"]
                out = torch.zeros_like(x)
                self.either(need, lambda: out.copy_(forward(z)), self._standin(branch.layer, x, out))
                return self._blended(branch.layer, x, out, torch.zeros_like(x))

            return run

        return [(branch.entry, enter), (branch.exit, leave)]

    def _whole(self, layer: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        adds, extras = self.loaded.decoder.branches[layer].adds_residual, self.extras.get(layer)

        def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            need = self.program.decide_on(layer, x.flatten(0, -2))
            assert need is not None
            start = (kwargs["residual"] if "residual" in kwargs else args[0]) if adds else torch.zeros_like(x)
            out = start.clone()
            beside = [torch.zeros_like(part) for part in extras or []]

            def work() -> None:
                y = forward(x, *args, **kwargs)
                for to, part in zip([out, *beside], [y] if extras is None else y, strict=True):
                    to.copy_(part.view(to.shape))

            self.either(need, work, self._standin(layer, x, out))
            out = self._blended(layer, x, out, start)
            return out if extras is None else (out, *beside)

        return run

    def _blended(self, layer: int, x: Tensor, out: Tensor, start: Tensor) -> Tensor:
        """`out` under a gate that decides; under one that blends, its share of it beside the stand-in's. `start`: what both begin
        with. Rows of scale 0 get what there is: the stand-in, or the MLP that another row needs."""
        scale = self.program.scale(layer)
        if scale is None:
            return out
        other = start.clone()
        if (instead := self._standin(layer, x, other)) is not None:
            instead()
        weight = scale.view(-1, *[1] * (x.dim() - 1)).to(x.dtype)
        return torch.where(weight == 0, out, weight * out + (1 - weight) * other)

    def _standin(self, layer: int, x: Tensor, out: Tensor) -> Callable[[], Any] | None:
        # Exactly these two cost nothing where they add nothing; one of another kind is asked.
        if type(self.standin) in (ZeroStandIn, LowRankStandIns) and not self.standin.cost_per_token(layer):
            return None

        def work() -> None:
            y = self.standin.rows(layer, x.flatten(0, -2))
            if y is not None:
                out.add_(y.view(out.shape))

        return work


@torch.inference_mode()
def parts_beside_rows(loaded: LoadedModel, program: Program) -> dict[int, list[Tensor]]:
    """What gated MLPs return beside their rows in a decode step (experts hand on their scores), by layer; of most, nothing. Where the
    MLP is skipped zeros stand for it: nothing that is generated depends on it."""
    gated = [layer for layer, source in enumerate(program.source) if source >= 0]
    found: dict[int, list[Tensor]] = {}

    def look(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                found[layer] = list(output[1:])

        return hook

    if not gated:
        return found
    decoder = loaded.decoder
    handles = [decoder.branches[layer].exit.register_forward_hook(look(layer)) for layer in gated]
    try:
        loaded.model(input_ids=torch.zeros(program.rows, 1, dtype=torch.long, device=loaded.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def refuse(loaded: LoadedModel, length: int) -> None:
    """What the model's own code would get wrong with a fixed cache and one mask for all layers."""
    config = loaded.model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or [])
    slides = any("sliding" in kind or "chunked" in kind for kind in kinds) or (
        isinstance(window, int) and getattr(config, "use_sliding_window", True) and not kinds
    )
    reach = window if isinstance(window, int) else getattr(config, "attention_chunk_size", None)
    if slides and isinstance(reach, int) and length > reach:
        raise InputError(
            f"{type(loaded.model).__name__} attends within a window of {reach} tokens, the cache is for {length}: its own code "
            "cannot be captured with it",
            hint=f"{EAGER}, or at most {reach} tokens in all",
        )
    strange = kinds - {"full_attention", "sliding_attention", "chunked_attention"}
    if strange:
        raise InputError(
            f"{type(loaded.model).__name__} has layers of kind {', '.join(sorted(strange))}: the graph engine serves attention "
            "with a cache of keys and values only",
            hint=EAGER,
        )
