"""MLPs of few rows in a captured pass: launches that a flag on the device stops, where more rows take nodes.

A trained stand-in is what the MLP's launches do when the flag is against them: one of the two is always written, so nobody clears
the output.

Under a router an MLP's first launch begins before the decision: all flags are PENDING from the beginning of the step, and what
the router writes is memory of its own, for the MLP's may be given out while the router still runs. Where the router is one launch
with the norm, a counter says that the MLP's rows are there, and what that launch reads nobody needs once it has said so. Only
where the graph is the whole step: in a piece of one nobody knows that its flags were made PENDING.

    rows = FewRows(session, mode, marks, routers); rows.open(count=1, whole=True)      # a pass begins
    out = rows.output(layer, x); router_score(..., **rows.router_memory(1)); y = rows.run(layer, x, out, flag)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sedac_cli.gpu.decode import norm_route_parts, norm_route_scratch
from sedac_cli.gpu.probe import RouterWeights, router_scratch
from sedac_cli.gpu.skinny import BATCH_ROWS, PENDING
from sedac_cli.runtime.graph.standins import LinearStandIns
from sedac_cli.standins import ZeroStandIn
from sedac_cli.standins.lowrank import LowRankStandIns
from sedac_cli.vllm.norms import ROUTED_ROWS

if TYPE_CHECKING:
    from sedac_cli.vllm.device import DeviceSession


class FewRows:
    def __init__(self, session: DeviceSession, mode: str, marks: Tensor, routers: dict[int, RouterWeights]):
        """`marks`: a counter per place of the parts of its normed rows that are there, then the flags."""
        self.session, self.mode, self.marks = session, mode, marks
        self.place = {layer: i for i, layer in enumerate(session.gated)}
        self.whole = self.racing = False
        self.outs: Tensor | None = None
        """[places, rows, hidden]: zero where an MLP under a flag does not write."""
        self.standins = LinearStandIns(ZeroStandIn(), torch.bfloat16, session.device)
        self.memory: tuple[Tensor, Tensor, Tensor] | None = None
        """Of routers: score, run, scratch."""
        if session.use_kernels:
            self.standins = LinearStandIns(self.known(), torch.bfloat16, session.device)
        if routers:
            device, most = session.device, max(BATCH_ROWS, ROUTED_ROWS)
            sizes = [router_scratch(BATCH_ROWS, weights, device) for weights in routers.values()]
            sizes.append(norm_route_scratch(ROUTED_ROWS, next(iter(routers.values())).width, device))
            score, run = (torch.empty(most, dtype=d, device=device) for d in (torch.float32, torch.bool))
            self.memory = score, run, max(sizes, key=Tensor.numel)

    def known(self) -> LowRankStandIns | ZeroStandIn:
        """The stand-ins in this rank's launches: all ranks' outputs are summed, so one rank has them. They come to the
        device here, so that steps without a graph read the same memory."""
        session, standin = self.session, self.session.standin
        if type(standin) is not LowRankStandIns:
            return ZeroStandIn()
        mine = [layer for layer in session.gated if layer in standin.by_layer and self.rank(layer) == 0]
        return LowRankStandIns({layer: standin.by_layer[layer].to(session.device, torch.bfloat16) for layer in mine})

    def rank(self, layer: int) -> int:
        mlp = self.session.dense[layer]
        return 0 if mlp is None else mlp.rank

    def takes(self, count: int) -> bool:
        """Whether a pass of so many rows runs under flags rather than in nodes."""
        return self.session.use_kernels and count <= BATCH_ROWS

    # A pass -----------------------------------------------------------------------------------------------------

    def open(self, count: int, whole: bool) -> None:
        self.outs = None
        self.whole = whole
        self.racing = self.mode == "routers" and whole and self.takes(count)
        if self.racing:
            self.marks.fill_(PENDING)

    def close(self) -> None:
        self.outs = None

    def router_memory(self, count: int) -> dict[str, Any]:
        """What `router_score` takes more, where an MLP may begin while it runs."""
        if not self.racing or self.memory is None:
            return {}
        score, run, scratch = self.memory
        return {"out": (score[:count], run[:count]), "scratch": scratch}

    def norm_memory(self, count: int) -> dict[str, Any]:
        """The same for `norm_route`, which always takes some."""
        assert self.memory is not None
        score, run, scratch = self.memory
        return {"decided": (score[:count], run[:count]), "scratch": scratch}

    def ready(self, layer: int, x: Tensor) -> tuple[Tensor, int] | None:
        """Where an MLP that races sees that its rows are there, and the value that says so."""
        place = self.place[layer]
        return (self.marks[place : place + 1], PENDING + norm_route_parts(*x.shape)) if self.racing else None

    def output(self, layer: int, x: Tensor) -> Tensor:
        """Where the MLP writes. Before the router is launched: an MLP that races it must come right behind it."""
        if self.rank(layer) != 0:
            return self.cleared(layer, x)
        if layer in self.standins:
            return torch.empty_like(x)
        instead = self.session.standin.rows(layer, x)
        return self.cleared(layer, x) if instead is None else instead.to(x.dtype)

    def output_ahead(self, layer: int, like: Tensor) -> Tensor | None:
        """The same before the rows are there, unless what stands in for them is what the output begins with."""
        standin = self.session.standin
        none = type(standin) is ZeroStandIn or (type(standin) is LowRankStandIns and layer not in standin.by_layer)
        if none or self.rank(layer) != 0 or layer in self.standins:
            return self.output(layer, like)
        return None

    def cleared(self, layer: int, x: Tensor) -> Tensor:
        """In a whole step one launch clears the outputs of all layers, and none stands between a norm and its MLP."""
        if not self.whole:
            return torch.zeros_like(x)
        if self.outs is None:
            self.outs = torch.zeros(len(self.place), *x.shape, dtype=x.dtype, device=x.device)
        return self.outs[self.place[layer]]

    def run(self, layer: int, x: Tensor, out: Tensor, flag: Tensor, ready: tuple[Tensor, int] | None = None) -> Tensor:
        mlp = self.session.dense[layer]
        assert mlp is not None
        others = self.standins.instead(layer)
        mlp.few(x, out, flag, settled=self.settled(layer), racing=self.racing, ready=ready, others=others)
        return mlp.reduce(out)

    def settled(self, layer: int) -> bool:
        """Whether the launch just ahead of an MLP cannot be the one that writes its flag, so that weights need not wait: probes
        speak an attention earlier; flags that are known are written ahead of the first MLP of a step."""
        return self.whole and (self.mode == "probes" or (self.mode == "static" and self.place[layer] > 0))

    def warm(self, layer: int, x: Tensor) -> None:
        """All launches of a capture once, so that they are compiled."""
        mlp = self.session.dense[layer]
        if mlp is None or not self.takes(x.shape[0]):
            return
        flag, out = torch.ones(1, dtype=torch.int32, device=x.device), torch.empty_like(x)
        for racing in (False, True) if self.mode == "routers" else (False,):
            mlp.few(x, out, flag, racing=racing, others=self.standins.instead(layer))
