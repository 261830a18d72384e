"""Many rows on a GPU: packed, run and put back there, while the host is already at the next layer.

Where an MLP is not of the kind that grouped products can run (quantized, with biases, experts), a gate blends, or the kernels
cannot run on this machine, the host packs the rows as everywhere else.

    work = OnDevice.of(branch, gate, standin)       # or None
    y = work(x, leave)                              # [rows, hidden]
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sedac_cli.gates.base import Gate
from sedac_cli.standins import StandIn, ZeroStandIn
from sedac_cli.standins.lowrank import LowRank, LowRankStandIns
from sedac_cli.structure import Branch

log = logging.getLogger("sedac")

PACK_FROM = 2048
"""Rows from which a GPU packs them itself (grouped products that end at a count on the device): nobody waits for the host."""


def may_pack(rows: Tensor) -> bool:
    """Many rows, of the kind the kernels take, and nobody who wants gradients of them or has them cast on their way."""
    plain = rows.is_cuda and rows.dtype == torch.bfloat16 and rows.shape[0] >= PACK_FROM
    return plain and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cuda")


@dataclass(frozen=True)
class OnDevice:
    mlp: Any
    standin: LowRank | None

    @classmethod
    def of(cls, branch: Branch, gate: Gate, standin: StandIn) -> OnDevice | None:
        module = standin.by_layer.get(branch.layer) if isinstance(standin, LowRankStandIns) else None
        # Exactly these two: one that derives from them may want to see the rows it is asked for.
        known = type(standin) in (ZeroStandIn, LowRankStandIns) and (module is None or module.rank % 8 == 0)
        if not known or gate.blends or branch.entry is not branch.exit:
            return None
        from sedac_cli.gpu.packed import PackedMlp
        from sedac_cli.runtime.graph.standard import NotStandardError, activation_of

        try:
            mlp = PackedMlp.of(branch.entry, activation_of(branch.entry))
        except NotStandardError:
            return None
        return cls(mlp, module) if mlp is not None and packs(mlp.gate.device) else None

    def __call__(self, x: Tensor, leave: Tensor) -> Tensor:
        pair = None
        if self.standin is not None:
            pair = tuple(p.detach().to(x) for p in (self.standin.a, self.standin.b, self.standin.bias))
        return self.mlp(x, leave, pair)


@functools.cache
def packs(device: torch.device) -> bool:
    """Whether the kernels run there. Nobody asks for them by name, so without them the host packs; that is said once."""
    from sedac_cli.gpu.compile import no_kernels

    missing = no_kernels(device)
    if missing:
        log.warning("passes of %d rows and more wait for the host on %s: %s", PACK_FROM, device, missing)
    return not missing
