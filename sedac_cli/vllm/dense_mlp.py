"""An MLP of vLLM's whose weights lie open: two matrices, an activation, no quantization, no adapter. Such a one can be run by
our own kernels: on packed rows whose number only the device knows, or on few rows under a flag that stops the launches.

    mlp = DenseMlp.of(layer.mlp)          # None: it stays what vLLM launches
    y = mlp.packed(rows, counts)          # counts [1] int32, on the device
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sedac_cli.gpu.packed import activate_rows, grouped
from sedac_cli.gpu.skinny import Others, skinny_gated, skinny_linear
from sedac_cli.vllm.surgery import adapted

ACTIVATIONS = {"SiluAndMul": "silu", "GeluAndMul": "gelu"}


@dataclass(frozen=True)
class DenseMlp:
    gate_up: Tensor
    """[2 x inner, hidden]: gate, then up."""
    down: Tensor
    activation: str
    parallel: int
    """Over how many GPUs the inner width is split."""
    rank: int

    @classmethod
    def of(cls, mlp: nn.Module) -> DenseMlp | None:
        parts = (getattr(mlp, name, None) for name in ("gate_up_proj", "down_proj", "act_fn"))
        first, last, act = parts
        if (
            first is None
            or last is None
            or act is None
            or type(act).__name__ not in ACTIVATIONS
            or len(list(mlp.children())) != 3
            or adapted(mlp)  # from vLLM 0.32 on what wraps a linear layer answers for it, its weight included
        ):
            return None
        for linear in (first, last):
            plain = type(getattr(linear, "quant_method", None)).__name__ == "UnquantizedLinearMethod"
            weight = getattr(linear, "weight", None)
            if (
                not plain
                or weight is None
                or weight.dtype != torch.bfloat16
                or getattr(linear, "bias", None) is not None
            ):
                return None
            if weight.dim() != 2 or not weight.is_contiguous() or weight.shape[1] % 8:
                return None
        if not getattr(last, "reduce_results", True):
            return None
        name = ACTIVATIONS[type(act).__name__]
        if name == "gelu" and getattr(act, "approximate", "none") == "tanh":
            name = "gelu_tanh"
        return cls(first.weight, last.weight, name, getattr(last, "tp_size", 1), getattr(last, "tp_rank", 0))

    def packed(self, rows: Tensor, counts: Tensor) -> Tensor:
        """The first counts[0] rows; what lies behind them is undefined, in and out. The host never learns how many."""
        gate, up = grouped(rows, self.gate_up, counts).chunk(2, dim=1)
        return self.reduce(grouped(activate_rows(gate, up, self.activation, counts), self.down, counts))

    def few(
        self,
        x: Tensor,
        out: Tensor,
        need: Tensor,
        settled: bool = False,
        racing: bool = False,
        ready: tuple[Tensor, int] | None = None,
        others: Others = (None, None),
    ) -> None:
        """A few rows into `out`, unless the flag is 0: then what the two of `others` make of them, or nothing is written.
        `settled`: the launch just ahead does not write the flag. `racing`: it does, the flag was PENDING before it, and x was
        there before it, or is there once the counter of `ready` has that value: nobody waits for the decision."""
        inner = self.gate_up.shape[0] // 2
        gate, up = self.gate_up[:inner], self.gate_up[inner:]
        z = skinny_gated(
            x, gate, up, self.activation, need=need, settled=settled, racing=racing, ready=ready, other=others[0]
        )
        skinny_linear(z, [self.down], out=out, need=need, settled=True, other=others[1])

    def reduce(self, y: Tensor) -> Tensor:
        if self.parallel == 1:
            return y
        from vllm.distributed import tensor_model_parallel_all_reduce

        return tensor_model_parallel_all_reduce(y)
