"""Capturing a decode step into a CUDA graph, and what may keep a machine or a model from it, said in the user's terms.

with on(model.device):
    replay = captured(once=step, work=burst, name="Qwen2ForCausalLM")
"""

from __future__ import annotations

import contextlib
import functools
import gc
import re
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch

from sedac_cli.errors import InputError, SedacError, no_room, ran_out
from sedac_cli.gates.span import SpanGate
from sedac_cli.models import LoadedModel
from sedac_cli.runtime.graph.constants import Constants
from sedac_cli.runtime.plan import Plan

EAGER = "--engine eager (of sedac serve: --backend eager)"
SMALLER = "fewer or shorter sequences; sedac serve: a smaller --max-length, or --shrink"
P = ParamSpec("P")
T = TypeVar("T")


def on(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Streams, events and graphs are those of the thread's current device, which need not be the model's."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def on_its_device(method: Callable[P, T]) -> Callable[P, T]:
    """A method of the engine, which may be called with another device current."""

    @functools.wraps(method)
    def there(*args: P.args, **kwargs: P.kwargs) -> T:
        engine: Any = args[0]
        with on(engine.device):
            return method(*args, **kwargs)

    return there


@functools.cache
def _stream_of(index: int) -> torch.cuda.Stream:
    """torch would capture on a stream of whichever device it first captured on."""
    return torch.cuda.Stream(index)


def captured(once: Callable[[], None], work: Callable[[], None], name: str) -> Callable[[], None]:
    """`work` as a CUDA graph of the current device, after two rounds of `once` that let every library set itself up. The graph
    keeps addresses alone: tensors that `work` reads and did not make are the caller's to hold for as long as the replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    try:
        with memory_said("while a decode step was captured"):
            with torch.cuda.stream(side):
                for _ in range(2):
                    once()
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            graph, constants = torch.cuda.CUDAGraph(), Constants()
            # A graph or a pool that the garbage collector frees while another is being captured ends the process.
            gc.collect()
            gc.disable()
            try:
                stream = _stream_of(torch.cuda.current_device())
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"), constants:
                    work()
            finally:
                gc.enable()
    except SedacError:
        raise
    except Exception as error:
        raise InputError(
            f"a decode step of {name} cannot be captured into a CUDA graph: {why(error)}",
            hint=f"{EAGER} runs any model (experts can be captured in bfloat16 only)",
        ) from error
    constants.side.synchronize()

    def replay(kept: Constants = constants) -> None:
        """Replays read what `kept` holds."""
        graph.replay()

    return replay


def why(error: Exception) -> str:
    line = (str(error).splitlines() or [type(error).__name__])[0]
    needs = re.search(r"between CPU and CUDA tensors|stream is capturing", line)
    return "within a step its code needs the host" if needs else line


@contextlib.contextmanager
def memory_said(what: str) -> Iterator[None]:
    """Memory that runs out in here is said in the engine's terms; `what`: for what, or while what."""
    try:
        yield
    except SedacError:
        raise
    except Exception as error:
        if not ran_out(error):
            raise
        raise no_room(error, what, SMALLER) from error


def require_served(loaded: LoadedModel, plan: Plan) -> None:
    """Refuse what the graph engine serves on no machine."""
    if loaded.model.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise InputError(
            f"{type(loaded.model).__name__} computes in {loaded.model.dtype}: the graph engine runs float32, float16 and bfloat16",
            hint=f"--dtype float32, or {EAGER}",
        )
    places = sorted({str(weight.device) for weight in loaded.model.parameters()})
    if len(places) > 1:
        raise InputError(
            f"{type(loaded.model).__name__} is spread over {', '.join(places)}: the graph engine runs on one GPU",
            hint=f"no --device-map, or {EAGER}",
        )
    if isinstance(plan.gate, SpanGate):
        raise InputError(
            "the graph engine skips MLPs; tokens that skip whole layers (ghost K and V) run in the eager engine",
            hint=EAGER,
        )


def require_graphs(device: torch.device) -> None:
    """A GPU that the kernels run on, CuPy and cuda-bindings, a driver with conditional nodes; otherwise what is missing."""
    from sedac_cli.gpu.compile import require_bindings, require_conditional_nodes, require_kernels

    if device.type != "cuda":
        if torch.cuda.is_available():
            why = f"the model's device is {device}"
        elif torch.version.cuda is None:
            why = "this torch was not built for CUDA"
        else:
            why = "none is usable, see sedac doctor"
        raise InputError(f"the graph engine needs a CUDA GPU: {why}", hint=f"{EAGER} runs anywhere")
    try:
        require_kernels(device)
        require_conditional_nodes()
        require_bindings()
    except RuntimeError as error:
        raise InputError(str(error), hint=f"{EAGER} needs none of this") from None
