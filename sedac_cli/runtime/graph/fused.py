"""A decode step of a standard model, by the decode kernels: five launches a layer, and what a gate closes ends at once.

A launch that hangs on a flag and is not needed leaves the residual stream alone, which is what a skipped MLP is, or does the
stand-in's part. Where more rows make cuBLAS the faster way, MLP and stand-in are the two branches of a conditional node instead.

    step = FusedStep(loaded.decoder, standard, plan.standin, cache, program)
    logits = step(state)                        # [rows, vocabulary]
"""

from __future__ import annotations

import torch
from torch import Tensor

from sedac_cli.gpu.skinny import MAX_SKINNY_ROWS, Others
from sedac_cli.runtime.graph.branches import Branches
from sedac_cli.runtime.graph.lookup import Lookup
from sedac_cli.runtime.graph.ops import make_ops
from sedac_cli.runtime.graph.programs import Entry, Program
from sedac_cli.runtime.graph.standard import Layer, Linear, NotStandardError, Standard
from sedac_cli.runtime.graph.standins import LinearStandIns
from sedac_cli.runtime.graph.state import KVCache, State
from sedac_cli.standins import StandIn
from sedac_cli.structure import Decoder

NEITHER: Others = (None, None)


class TooManyRowsError(NotStandardError):
    """The model may be standard, the batch is not."""


class FusedStep:
    def __init__(self, decoder: Decoder, standard: Standard, standin: StandIn, cache: KVCache, program: Program):
        self.decoder, self.standard, self.cache, self.program = decoder, standard, cache, program
        rows = program.rows
        if rows > MAX_SKINNY_ROWS:
            raise TooManyRowsError(f"{rows} sequences at once: the decode kernels take up to {MAX_SKINNY_ROWS}")
        embedding = decoder.model.get_input_embeddings()
        dtype = embedding.weight.dtype
        self.ops = make_ops(rows, dtype, decoder.device)
        self.lookup = Lookup(embedding, standard.rotary, cache.places)
        self.standins = LinearStandIns(standin, dtype, decoder.device)
        head = decoder.model.get_output_embeddings()
        self.head = Linear([head.weight], [head.bias]) if type(head) is torch.nn.Linear else None
        self.either = None if self.ops.stops else Branches(decoder.device)

    def __call__(self, state: State) -> Tensor:
        ops, program = self.ops, self.program
        h, (cos, sin), real = self.lookup(state, ops)
        program.begin(state.position, real)
        for index, layer in enumerate(self.standard.layers):
            program.enter(index, h)
            qkv = ops.linear(h, layer.qkv, norm=layer.norm)
            attended = ops.attend(
                qkv, layer.heads, cos, sin, *self.cache.layers[index], state.slot, state.first, layer.head_norms
            )
            h = ops.linear(attended, layer.out, residual=h, out=h)
            self.mlp(index, layer, program.before_mlp(index, h, layer.mlp_norm, ops), h)
        if self.head is None:
            return self.decoder.head(ops.norm(h, self.standard.norm))
        return self.decoder._shape_logits(ops.linear(h, self.head, norm=self.standard.norm), self.decoder.logit_scale)

    def mlp(self, index: int, layer: Layer, entry: Entry, h: Tensor) -> None:
        """h += MLP, or the stand-in, in place."""
        scale, need = self.program.scale(index), entry.need
        if scale is not None and need is not None:
            self.blend(index, layer, entry, h, scale, need)
        elif need is None or self.either is None:
            self.run(layer, entry, h, need, self.standins.instead(index) if need is not None else NEITHER)
        else:
            otherwise = (lambda: self.instead(index, entry, h)) if index in self.standins else None
            self.either(need, lambda: self.run(layer, entry, h), otherwise)

    def run(self, layer: Layer, entry: Entry, h: Tensor, need: Tensor | None = None, others: Others = NEITHER) -> None:
        """With a flag that is 0 the launches do what is in `others`."""
        z = self.ops.gated(
            entry.x, layer.gate, layer.up, layer.activation, layer.mlp_biases, need=need, settled=entry.settled,
            ready=entry.ready, norm=entry.norm, other=others[0],
        )  # fmt: skip
        self.ops.linear(z, layer.down, residual=h, out=h, need=need, settled=True, other=others[1])

    def instead(self, index: int, entry: Entry, h: Tensor) -> None:
        if index in self.standins:
            self.standins(self.ops, index, entry.x, h, residual=h, norm=entry.norm)

    def blend(self, index: int, layer: Layer, entry: Entry, h: Tensor, scale: Tensor, need: Tensor) -> None:
        """h += scale * MLP + (1 - scale) * stand-in; the MLP only where a row has a scale above 0. Rows of scale 0 then get it too."""
        y = torch.zeros_like(h)
        if self.either is None:
            self.run(layer, entry, y, need)
        else:
            self.either(need, lambda: self.run(layer, entry, y))
        weight = torch.where(scale == 0, need, scale).unsqueeze(1).to(h.dtype)
        other = torch.zeros_like(h)
        self.instead(index, entry, other)
        h.add_(weight * y + (1 - weight) * other)
