"""IF and IF-ELSE inside a CUDA graph, decided on the device: a kernel sets a condition, the node's body runs or does not.

A body is whatever torch launches inside a `with`: it is captured on a stream of its own, with a memory pool of its own,
into the node's graph. Handles are made up front, so that one launch arms every later node of a step.

    nodes = ConditionalGraph()                                   # before capture: compiles, makes stream and pool
    nodes.warm(lambda: mlp(x))                                   # libraries set up their workspaces outside the graph
    with torch.cuda.graph(graph, capture_error_mode="relaxed"):
        conditions = nodes.conditions(len(layers))
        conditions.set(flags)                                    # int32, one per node; or one for all
        for i, mlp in enumerate(layers):
            y = torch.zeros_like(x)
            with conditions.body(i):
                y.copy_(mlp(x))
            x = x + y

`relaxed` is needed: a body allocates while the outer stream is being captured. What a body writes and later nodes read must
be allocated outside it (`y` above). Keep the ConditionalGraph as long as its graphs: it owns the bodies' memory. Each handle
must get its node: a condition nobody uses makes the graph fail to instantiate.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sedac_cli.gpu.compile import I32, compiled, device_index, launch, require_conditional_nodes
from sedac_cli.gpu.tensors import flat

_CONSTANTS = {"SET_CONDITION": 1}


class _Runtime:
    """The few CUDA runtime calls, checked, under the names of cuda-bindings 12 and 13 alike."""

    def __init__(self) -> None:
        try:
            self.rt: Any = importlib.import_module("cuda.bindings.runtime")
        except ImportError as error:
            raise RuntimeError(
                f"conditional graph nodes need cuda-bindings ({error}): pip install cuda-bindings"
            ) from error
        # Version 12 keeps the forms with edge data under a suffix; version 13 has nothing else.
        self._info = self._newest("cudaStreamGetCaptureInfo", "_v3")
        self._add = self._newest("cudaGraphAddNode", "_v2")
        self._update = self._newest("cudaStreamUpdateCaptureDependencies", "_v2")

    def _newest(self, name: str, suffix: str) -> Any:
        return getattr(self.rt, name + suffix, None) or getattr(self.rt, name)

    @staticmethod
    def check(result: tuple[Any, ...], what: str) -> tuple[Any, ...]:
        if int(result[0]) != 0:
            raise RuntimeError(f"{what} failed: {result[0]}")
        return result[1:]

    def capture(self, stream: int) -> tuple[Any, Any, Any, int]:
        """(graph, dependencies, their edge data, how many) of a stream that is being captured."""
        status, _, graph, nodes, edges, count = self.check(self._info(stream), "cudaStreamGetCaptureInfo")
        if int(status) != int(self.rt.cudaStreamCaptureStatus.cudaStreamCaptureStatusActive):
            raise RuntimeError("conditional nodes exist only inside a CUDA graph: capture one with torch.cuda.graph")
        return graph, nodes, edges, count

    def handle(self, graph: Any) -> int:
        (made,) = self.check(self.rt.cudaGraphConditionalHandleCreate(graph, 0, 0), "cudaGraphConditionalHandleCreate")
        return int(made)

    def add_if(self, stream: int, handle: int, size: int) -> list[Any]:
        """Append an IF node (size 2: IF-ELSE) to what the stream has captured; its body graphs."""
        graph, nodes, edges, count = self.capture(stream)
        rt = self.rt
        params = rt.cudaGraphNodeParams()
        params.type = rt.cudaGraphNodeType.cudaGraphNodeTypeConditional
        params.conditional.handle = rt.cudaGraphConditionalHandle(handle)
        params.conditional.type = rt.cudaGraphConditionalNodeType.cudaGraphCondTypeIf
        params.conditional.size = size
        (node,) = self.check(self._add(graph, nodes, edges, count, params), "cudaGraphAddNode")
        replace = rt.cudaStreamUpdateCaptureDependenciesFlags.cudaStreamSetCaptureDependencies
        self.check(self._update(stream, [node], None, 1, int(replace)), "cudaStreamUpdateCaptureDependencies")
        # Copied: the list points into memory that CUDA owns.
        return [rt.cudaGraph_t(int(body)) for body in params.conditional.phGraph_out]

    def begin(self, stream: int, graph: Any) -> None:
        mode = self.rt.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        self.check(
            self.rt.cudaStreamBeginCaptureToGraph(stream, graph, None, None, 0, mode), "cudaStreamBeginCaptureToGraph"
        )

    def end(self, stream: int) -> None:
        self.check(self.rt.cudaStreamEndCapture(stream), "cudaStreamEndCapture")


@functools.cache
def own_streams(index: int) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """Two streams of the device that nobody else has: torch deals its own from a ring of 32, so the 33rd asked for may be the
    one that is just being captured."""
    with torch.cuda.device(index):
        torch.cuda.current_stream().synchronize()  # the context exists
        runtime = _Runtime()
        made = [runtime.check(runtime.rt.cudaStreamCreateWithFlags(1), "cudaStreamCreateWithFlags") for _ in range(2)]
        first, second = (torch.cuda.ExternalStream(int(stream), device=index) for (stream,) in made)
        return first, second


class ConditionalGraph:
    """What conditional nodes need around a capture: the kernel, a stream and a pool for bodies, and what must stay alive."""

    def __init__(self, device: torch.device | str = "cuda", native_else: bool | None = None):
        """`native_else`: IF-ELSE as one node (CUDA 12.8); None finds out, False uses two IF nodes with opposite conditions."""
        cupy = require_conditional_nodes()
        self.index = device_index(torch.device(device))
        self.device = torch.device("cuda", self.index)
        self.runtime = _Runtime()
        if native_else is None:
            (built,) = self.runtime.check(self.runtime.rt.getLocalRuntimeVersion(), "getLocalRuntimeVersion")
            native_else = min(int(built), cupy.cuda.runtime.driverGetVersion()) >= 12080
        self.native_else = native_else
        compiled("conditional", "set_conditions", tuple(_CONSTANTS.items()), self.index, 0)
        self.stream, self.upload = own_streams(self.index)
        with torch.cuda.device(self.index):
            self.pool = torch.cuda.MemPool()
        self.none = Conditions(self, [], False, torch.zeros(1, dtype=torch.int64, device=self.device))
        """Conditions without a node: pass as `arm=` to compile that form of a kernel before capturing."""
        self.tables: list[Tensor] = []
        self.body_open = False

    def warm(self, work: Callable[[], Any]) -> None:
        """Run once on the stream that bodies are captured on, so that cuBLAS and others allocate their workspace now."""
        current = torch.cuda.current_stream(self.index)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            work()
        current.wait_stream(self.stream)

    def conditions(self, count: int, either: bool = False) -> Conditions:
        """`count` conditions of the graph being captured on the current stream, each for one `body` (or, `either`, for one
        pair of `branches`)."""
        if count < 1:
            raise ValueError(f"{count} conditions")
        graph, *_ = self.runtime.capture(torch.cuda.current_stream(self.index).cuda_stream)
        opposite = either and not self.native_else
        handles = [self.runtime.handle(graph) for _ in range(count * (2 if opposite else 1))]
        # On a stream that is not captured: the table is there before the graph first runs, and is no node of it.
        with torch.cuda.stream(self.upload):
            table = torch.from_numpy(np.array(handles, dtype=np.uint64).view(np.int64)).to(self.device)
        self.upload.synchronize()
        self.tables.append(table)
        return Conditions(self, handles, either, table)


class Conditions:
    """The conditions of one captured graph. `table`, `count` and `has_opposite` are what kernels read."""

    def __init__(self, owner: ConditionalGraph, handles: list[int], either: bool, table: Tensor):
        self.owner, self.handles, self.either, self.table = owner, handles, either, table
        self.has_opposite = either and not owner.native_else
        self.count = len(handles) // (2 if self.has_opposite else 1)
        self.used: set[int] = set()

    def set(self, flags: Tensor) -> None:
        """One launch: condition i holds iff flags[i] != 0; a single flag speaks for all."""
        single = flags.numel() == 1
        flat(flags, "flags", 1 if single else self.count, self.table.device, torch.int32)
        launch(
            "conditional", "set_conditions", _CONSTANTS, self.table.device, grid=(1,), threads=128,
            args=[self.table, flags, I32(0 if single else 1), I32(self.count), I32(int(self.has_opposite))],
        )  # fmt: skip

    def body(self, index: int) -> Body:
        """What is launched inside runs iff condition `index` holds."""
        if self.either:
            raise ValueError("these conditions were made for `branches`, not for `body`")
        self._use(index)
        (graph,) = self._node(self.handles[index], 1)
        return Body(self.owner, graph)

    def branches(self, index: int) -> tuple[Body, Body]:
        """(run, otherwise): the first runs iff condition `index` holds, the second iff it does not. Open both in turn."""
        if not self.either:
            raise ValueError("conditions for `branches` are made with conditions(count, either=True)")
        self._use(index)
        if self.has_opposite:
            graphs = self._node(self.handles[index], 1) + self._node(self.handles[self.count + index], 1)
        else:
            graphs = self._node(self.handles[index], 2)
        return Body(self.owner, graphs[0]), Body(self.owner, graphs[1])

    def _use(self, index: int) -> None:
        if not 0 <= index < self.count:
            raise ValueError(f"condition {index} does not exist: there are {self.count}")
        if index in self.used:
            raise ValueError(f"condition {index} has its node already: a handle belongs to one node")
        if self.owner.body_open:
            raise RuntimeError("a conditional node inside another one's body is not supported")
        self.used.add(index)

    def _node(self, handle: int, size: int) -> list[Any]:
        stream = torch.cuda.current_stream(self.owner.index).cuda_stream
        return self.owner.runtime.add_if(stream, handle, size)


class Body:
    """A context: everything launched inside becomes the body of a node, on the body stream, allocating from the body pool."""

    def __init__(self, owner: ConditionalGraph, graph: Any):
        self.owner, self.graph = owner, graph

    def __enter__(self) -> None:
        owner = self.owner
        if owner.body_open:
            raise RuntimeError("the body of another conditional node is still open")
        self.outer = torch.cuda.current_stream(owner.index)
        owner.runtime.begin(owner.stream.cuda_stream, self.graph)
        owner.body_open = True
        self.memory = torch.cuda.use_mem_pool(owner.pool, owner.device)
        self.memory.__enter__()
        torch.cuda.set_stream(owner.stream)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        owner = self.owner
        torch.cuda.set_stream(self.outer)
        self.memory.__exit__(None, None, None)
        owner.body_open = False
        try:
            owner.runtime.end(owner.stream.cuda_stream)
        except RuntimeError:
            if error is None:  # otherwise what went wrong inside is the news
                raise
