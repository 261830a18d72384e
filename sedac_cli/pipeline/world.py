"""The processes of one run: alone, or started together by `accelerate launch` or torchrun.

Always true: every operation gives all processes the same values, and is the identity for a process that is alone.

    world = World.join(); loaded = load_model(world.place(ModelSpec())); mean = world.mean(loss)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sedac_cli.config import ModelSpec


class World:
    def __init__(self, state: Any | None = None):
        self.state = state
        self.rank = state.process_index if state else 0
        self.size = state.num_processes if state else 1
        self.main = self.rank == 0

    @classmethod
    def join(cls) -> World:
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        from accelerate import PartialState

        # Told so, accelerate joins CPU processes whoever started them; left to itself, only those of its own launcher.
        return cls(PartialState(cpu=not torch.cuda.is_available()))

    def wait(self) -> None:
        if self.state:
            self.state.wait_for_everyone()

    def only_main(self, make: Callable[[], Any]) -> Any:
        return make() if self.main else nullcontext()

    def place(self, model: ModelSpec) -> ModelSpec:
        """Each process on its own device, unless the user named one."""
        return replace(model, device=str(self.state.device)) if self.state and model.device == "auto" else model

    # Tensors of one shape on every process ------------------------------------------------------------------------

    def sum(self, value: Tensor) -> Tensor:
        return self._reduced(value, "sum")

    def mean(self, value: Tensor) -> Tensor:
        return self._reduced(value, "mean")

    def joined(self, value: Tensor) -> Tensor:
        """The processes' tensors one after the other, along the first dimension."""
        if self.size == 1:
            return value
        from accelerate.utils import gather

        return gather(value.contiguous())

    def share_first(self, values: Iterable[Tensor]) -> None:
        """Overwrite the values with the first process's."""
        if self.size > 1:
            from accelerate.utils import broadcast

            for value in values:
                value.copy_(broadcast(value.contiguous()))

    def _reduced(self, value: Tensor, how: str) -> Tensor:
        if self.size == 1:
            return value
        from accelerate.utils import reduce

        return reduce(value, how)
