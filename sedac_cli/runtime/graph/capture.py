"""Capturing a decode step into a CUDA graph, and what may keep a machine or a model from it, said in the user's terms.

replay = captured(once=step, work=burst, name="Qwen2ForCausalLM")
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from sedac_cli.errors import InputError, SedacError
from sedac_cli.models import LoadedModel


def captured(once: Callable[[], None], work: Callable[[], None], name: str) -> Callable[[], None]:
    """`work` as a CUDA graph, after two rounds of `once` that let every library set itself up."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(side):
            for _ in range(2):
                once()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # A graph or a pool that the garbage collector frees while another is being captured ends the process.
        gc.collect()
        gc.disable()
        try:
            with torch.cuda.graph(graph, capture_error_mode="relaxed"):
                work()
        finally:
            gc.enable()
    except torch.cuda.OutOfMemoryError as error:
        raise InputError(
            f"out of GPU memory while a decode step was captured: {error}", hint="--max-length, --batch"
        ) from None
    except SedacError:
        raise
    except Exception as error:
        raise InputError(
            f"a decode step of {name} cannot be captured into a CUDA graph: {str(error).splitlines()[0]}",
            hint="--engine eager runs any model",
        ) from error
    return graph.replay


class memory_said:  # noqa: N801 - used as a with statement
    """A cache that does not fit is said in its own terms."""

    def __init__(self, batch: int, max_length: int):
        self.batch, self.max_length = batch, max_length

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise InputError(
                f"no GPU memory for a cache of {self.batch} x {self.max_length} tokens",
                hint="a smaller --max-length or --batch",
            ) from None


def require_graphs(loaded: LoadedModel) -> None:
    """A GPU, CuPy of its CUDA, and a driver with conditional nodes; otherwise what is missing."""
    from sedac_cli.gpu.compile import require_conditional_nodes

    if loaded.device.type != "cuda":
        raise InputError(
            f"the graph engine needs a CUDA GPU; this model is on {loaded.device}",
            hint="--engine eager (of sedac serve: --backend eager) runs anywhere",
        )
    try:
        require_conditional_nodes()
    except RuntimeError as error:
        raise InputError(str(error), hint="--engine eager needs none of this") from None
