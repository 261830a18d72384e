"""Work that hangs on a flag in device memory: a conditional node in a graph, a plain branch on a CPU.

either = Branches(device)
either(need, lambda: out.copy_(mlp(x)), lambda: out.copy_(standin(x)))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Work = Callable[[], Any]


class Branches:
    """On a GPU outside a capture (the rounds that set libraries up before one) both branches run, on the stream that bodies
    are captured on; their results count for nothing."""

    def __init__(self, device: torch.device):
        self.nodes: Any = None
        if device.type == "cuda":
            from sedac_cli.gpu.conditional import ConditionalGraph

            self.nodes = ConditionalGraph(device)

    def __call__(self, need: Tensor, run: Work, otherwise: Work | None = None) -> None:
        if self.nodes is None:
            if bool(need):
                run()
            elif otherwise is not None:
                otherwise()
        elif not torch.cuda.is_current_stream_capturing():
            for work in (run, otherwise):
                if work is not None:
                    self.nodes.warm(work)
        else:
            conditions = self.nodes.conditions(1, either=otherwise is not None)
            conditions.set(need)
            if otherwise is None:
                with conditions.body(0):
                    run()
                return
            first, second = conditions.branches(0)
            with first:
                run()
            with second:
                otherwise()
