"""What a step's rows are, in device memory: written before the step is launched, read by the graph that is replayed.

One record per row, behind one record for the step, so a step is one small copy. Host memory is a ring: a step may be prepared
while the copy of the one before has not been made yet.

    inputs = StepInputs(max_rows=8192, device=device)
    inputs.write(position, state, strict, protected=False)
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

PADDING, MAY_SKIP, MUST_RUN = 0, 1, 2
RING = 8


class StepInputs:
    def __init__(self, max_rows: int, device: torch.device):
        self.device = device
        self.records = torch.zeros(max_rows + 1, 3, dtype=torch.int32, device=device)
        pinned = device.type == "cuda"
        self.ring = [torch.zeros(max_rows + 1, 3, dtype=torch.int32, pin_memory=pinned) for _ in range(RING)]
        self.turn = 0
        self.written = 0

    def write(self, position: np.ndarray, state: np.ndarray, strict: np.ndarray | None, protected: bool) -> None:
        """The rows of the coming step; rows that only an earlier step had become padding."""
        host = self.ring[self.turn]
        self.turn = (self.turn + 1) % RING
        count = len(position)
        end = 1 + max(count, self.written)
        table = host.numpy()
        table[0, 0], table[0, 1] = int(protected), count
        table[1 : 1 + count, 0] = position
        if strict is not None:
            table.view(np.float32)[1 : 1 + count, 1] = strict
        table[1 : 1 + count, 2] = state
        table[1 + count : end, 2] = PADDING
        self.written = count
        self.records[:end].copy_(host[:end], non_blocking=True)

    @property
    def protected(self) -> Tensor:
        """[1] int32: whether any row must run every MLP."""
        return self.records[0, 0:1]

    @property
    def count(self) -> Tensor:
        """[1] int32: rows that are tokens."""
        return self.records[0, 1:2]

    def position(self, rows: int) -> Tensor:
        return self.records[1 : 1 + rows, 0]

    def strict(self, rows: int) -> Tensor:
        return self.records.view(torch.float32)[1 : 1 + rows, 1]

    def state(self, rows: int) -> Tensor:
        return self.records[1 : 1 + rows, 2]
