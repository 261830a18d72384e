"""What a model's code brings from the host in every step: numbers, lists of columns, buffers that were left there.

A graph cannot keep such a copy. They are the same in every step, so they are brought once, beside the capture, and what is
captured copies them on the device: the model may write into what it gets.

    constants = Constants()
    with torch.cuda.graph(graph), constants:
        step()
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sedac_cli.gpu.conditional import own_streams

MAKERS: set[Any] = {torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor}
MOVERS: set[Any] = {Tensor.to, Tensor.cuda, Tensor.type_as}


class Constants(TorchFunctionMode):
    """What was brought lives as long as this, which the graph must not outlive."""

    def __init__(self) -> None:
        super().__init__()
        _, self.side = own_streams(torch.cuda.current_device())
        self.kept: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and (func in MAKERS or func in MOVERS) and on_host(args[0]):
            return self._bring(lambda: func(*args, **kwargs))
        if func is Tensor.__getitem__ and args[0].is_cuda:
            return func(args[0], self._index(args[0], args[1]))
        if func is Tensor.__setitem__ and args[0].is_cuda:
            x, index, value = args
            if on_host(value):
                value = self._bring(lambda: torch.as_tensor(args[2], device=x.device, dtype=x.dtype))
            return func(x, self._index(x, index), value)
        return func(*args, **kwargs)

    def _bring(self, make: Callable[[], Tensor]) -> Tensor:
        with torch.cuda.stream(self.side):
            made = make()
        if not made.is_cuda:
            return made
        self.kept.append(made)
        return made.clone()

    def _index(self, x: Tensor, index: Any) -> Any:
        if isinstance(index, tuple):
            return tuple(self._index(x, part) for part in index)
        if (isinstance(index, list) or (isinstance(index, Tensor) and index.dim())) and on_host(index):
            return self._bring(lambda: torch.as_tensor(index, device=x.device))
        return index


def on_host(data: Any) -> bool:
    """Known without asking a device: what is read from one within a capture is no constant."""
    if isinstance(data, (list, tuple)):
        return all(map(on_host, data))
    return isinstance(data, (bool, int, float)) or (isinstance(data, Tensor) and not data.is_cuda)
