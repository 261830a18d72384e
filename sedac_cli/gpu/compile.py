"""From a CUDA source to a launch on torch's stream: compiled once per device, element types and constants, then cached.

What always holds: a launch allocates nothing outside torch's allocator and never waits, so it may be captured into a CUDA
graph; the one thing that may not happen during capture is a first use (it compiles), and that is refused by name. Asking for
a kernel on a machine without a GPU, or with a CuPy that does not fit torch, is an error that says what to install.

    launch("route", "split", {"WIDTH": 16, "KEY": 0, "TWO": 1}, device, grid=(8,), threads=256, args=[rows, I64(1), ...])
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import logging
import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger(__name__)
I32, I64, F32 = np.int32, np.int64, np.float32
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
SOURCES = Path(__file__).parent / "cuda"
SHARED_SOURCES = ("primitives.cuh", "common.cuh")
OWN = {
    "entropy": ("entropy_state.cuh",), "norm_route": ("router_parts.cuh",), "router_few": ("router_parts.cuh",),
    "skinny": ("linear_parts.cuh",), "batch": ("linear_parts.cuh",), "batch_hopper": ("linear_parts.cuh",),
}  # fmt: skip
CUPYS = ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x")
"""Names that CuPy is installed under. All of them hold the same files."""
PORTABLE_CLUSTER = 8
"""Blocks of a cluster that every chip with clusters takes; more must be asked for."""
OPTIONS = ("-std=c++17", "-ftz=true")
MAX_ROWS = 32768
"""Rows (or tiles of rows) one launch may count."""
DEFAULT_SHARED = 48 * 1024
"""Shared memory, static and dynamic together, that a block may have without asking for more first."""
_SLOT, _SLOTS = MAX_ROWS + 64, 128  # 17 MB: torch has 32 streams a priority, each eager or captured

_arenas: dict[int, Tensor] = {}
_dealing = threading.Lock()
_slots: dict[tuple[int, int, bool], int] = {}


def source_text(family: str, constants: Mapping[str, int]) -> str:
    """The whole translation unit. Constants stand above it, not on the command line, where `-DT=2` would hit CUDA's headers."""
    head = "".join(f"#define {name} {value}\n" for name, value in constants.items())
    return head + "".join(
        (SOURCES / name).read_text() for name in (*SHARED_SOURCES, *OWN.get(family, ()), f"{family}.cu")
    )


def kind(tensor: Tensor, name: str) -> int:
    """The element kind that the sources know the tensor's dtype by."""
    if tensor.dtype not in KINDS:
        raise ValueError(f"{name} is {tensor.dtype}: the kernels take float32, float16 and bfloat16")
    return KINDS[tensor.dtype]


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def install_cupy(major: str, installed: Sequence[str]) -> str:
    """The commands after which there is CuPy for this CUDA and no other: two in one environment break each other."""
    remove = f"pip uninstall -y {' '.join(installed)} && " if installed else ""
    return f"{remove}pip install cupy-cuda{major}x"


@functools.cache
def require_gpu() -> Any:
    """CuPy, once everything it needs is known to be there."""
    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA device is visible: on the CPU use the plain-torch twins in sedac_cli.gpu.reference")
    built = torch.version.cuda
    if built is None:
        raise RuntimeError("this torch was not built for CUDA: the kernels need NVIDIA's CUDA 12 or 13")
    major = built.split(".")[0]
    command = install_cupy(major, [name for name in CUPYS if installed_version(name)])
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        raise RuntimeError(f"the kernels need CuPy ({error}): {command}") from error
    found = cupy.cuda.runtime.runtimeGetVersion() // 1000
    if found != int(major):
        raise RuntimeError(f"torch uses CUDA {built} but CuPy is built for CUDA {found}: {command}")
    return cupy


def require_kernels(device: torch.device) -> None:
    """CuPy, and a GPU that the kernels can be compiled for."""
    require_gpu()
    properties(device_index(device))


def no_kernels(device: torch.device, early: bool = False) -> str | None:
    """Why the kernels (`early`: also those launched early) cannot run there; None where they can. For work that nobody asked
    them by name to do."""
    try:
        require_kernels(device)
        if early:
            require_bindings()
    except RuntimeError as error:
        return str(error)
    return None


def require_bindings() -> None:
    """What CuPy has no calls for: launches with attributes, conditional nodes."""
    major = (torch.version.cuda or "").split(".")[0]
    for name in ("driver", "runtime"):
        try:
            importlib.import_module(f"cuda.bindings.{name}")
        except ImportError as error:
            raise RuntimeError(
                f"CUDA graphs need cuda-bindings ({error}): pip install 'cuda-bindings=={major}.*'"
            ) from error


def require_conditional_nodes() -> Any:
    """CuPy, on a driver that has conditional graph nodes."""
    cupy = require_gpu()
    driver = cupy.cuda.runtime.driverGetVersion()
    if driver < 12040:
        raise RuntimeError(
            f"conditional graph nodes need CUDA 12.4 or newer; this driver has {driver // 1000}.{driver % 1000 // 10}"
        )
    return cupy


def refuse_in_capture(what: str) -> None:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{what} is needed for the first time inside a CUDA graph capture: call it once before capturing"
        )


@functools.cache
def properties(index: int) -> Any:
    """Multiprocessors, shared memory and capability of a device; asking torch each time would cost more than a launch."""
    found = torch.cuda.get_device_properties(index)
    if found.major < 8:
        raise RuntimeError(f"{found.name} has compute capability {found.major}.{found.minor}: the kernels need 8.0")
    return found


def code_of(text: str, name: str, capability: str, linked: bool) -> bytes:
    """By NVRTC, for one chip alone ("90a"): CuPy compiles for plain capabilities. Not `linked`, PTX: of kernels that set conditions, for
    only the driver's linker knows cudaGraphSetConditional."""
    nvrtc = importlib.import_module("cupy.cuda").nvrtc
    program = nvrtc.createProgram(text, f"{name}.cu", (), ())
    try:
        nvrtc.compileProgram(program, (*OPTIONS, f"--gpu-architecture={'sm' if linked else 'compute'}_{capability}"))
        return bytes(nvrtc.getCUBIN(program)) if linked else bytes(nvrtc.getPTX(program)).rstrip(b"\0")
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"{name}.cu does not compile: {error}\n{nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)


def kept_code(text: str, name: str, capability: str, linked: bool) -> Path:
    """A file with it, among those that CuPy keeps of what it compiles: made once for all processes."""
    version = importlib.import_module("cupy.cuda").nvrtc.getVersion()
    digest = hashlib.sha256(repr((version, OPTIONS, capability, linked, text)).encode()).hexdigest()[:40]
    folder = Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")
    path = folder / f"sedac_{name}_{digest}.{'cubin' if linked else 'ptx'}"
    if not path.is_file():
        code = code_of(text, name, capability, linked)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as part:
            part.write(code)
        os.replace(part.name, path)
    return path


def refuse_shared(what: str, fixed: int, dynamic: int, limit: int) -> None:
    """An error for shared memory that no launch could get; the driver would only say "invalid value"."""
    if fixed + dynamic > limit:
        raise RuntimeError(
            f"{what} asks for {dynamic} bytes of shared memory beside {fixed} of its own: this device has {limit} a block"
        )


def refuse_shape(what: str, grid: Sequence[int], threads: int) -> None:
    """An error for a launch shape that the driver would only call an invalid value."""
    limits = (2**31 - 1, 65535, 65535)
    if not 0 < threads <= 1024 or not all(0 < size <= limit for size, limit in zip(grid, limits, strict=False)):
        raise RuntimeError(f"{what} launched as {tuple(grid)} blocks of {threads} threads: no device takes that")


@functools.cache
def compiled(family: str, entry: str, constants: tuple[tuple[str, int], ...], index: int, shared: int) -> Any:
    """The kernel, loaded on device `index`, allowed to use `shared` bytes of dynamic shared memory."""
    values = dict(constants)
    conditional, chip = "SET_CONDITION" in values, "a" if values.get("CLUSTER") else ""
    cupy = require_conditional_nodes() if conditional else require_gpu()
    found = properties(index)
    refuse_in_capture(f"the kernel {family}.{entry} {values}")
    text = source_text(family, values)
    with torch.cuda.device(index), cupy.cuda.Device(index):
        _arena(index)
        if conditional or chip:
            path = kept_code(text, family, f"{found.major}{found.minor}{chip}", not conditional)
            kernel = cupy.RawModule(path=str(path)).get_function(entry)
        else:
            # CuPy adds -ftz=true by itself, and keeps the binary in its own cache on disk.
            kernel = cupy.RawModule(code=text, options=OPTIONS[:1]).get_function(entry)
        registers = kernel.num_regs  # asking loads it now, while nothing is captured
        fixed = kernel.shared_size_bytes
        refuse_shared(f"{family}.{entry} {values}", fixed, shared, found.shared_memory_per_block_optin)
        if fixed + shared > DEFAULT_SHARED:  # the limit is on the sum: 48 KiB asked for at launch are already too much
            # Equal sources share one function and its limit, whatever each asks for: all a block may have.
            kernel.max_dynamic_shared_size_bytes = found.shared_memory_per_block_optin - fixed
        if values.get("CLUSTERED") and values["SPLITS"] > PORTABLE_CLUSTER:
            driver: Any = importlib.import_module("cuda.bindings.driver")
            allowed = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
            (status,) = driver.cuFuncSetAttribute(driver.CUfunction(kernel.kernel.ptr), allowed, 1)
            if int(status):
                raise RuntimeError(f"clusters of {values['SPLITS']} blocks: {status}")
    log.debug("%s.%s %s: %d registers", family, entry, values, registers)
    return kernel


def clusters_at_once(
    family: str, entry: str, constants: Mapping[str, int], index: int, threads: int, shared: int
) -> int:
    """How many clusters of this kernel a device holds at a time: chips differ in how many multiprocessors lie side by side."""
    kernel = compiled(family, entry, tuple(constants.items()), index, shared)
    driver: Any = importlib.import_module("cuda.bindings.driver")
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = constants["CLUSTER"], 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = shared
    with torch.cuda.device(index):
        status, count = driver.cuOccupancyMaxActiveClusters(driver.CUfunction(kernel.kernel.ptr), config)
    if int(status):
        raise RuntimeError(f"clusters of {family}.{entry}: {status}")
    return int(count)


@functools.lru_cache(maxsize=256)
def _stream(pointer: int) -> Any:
    cupy = require_gpu()
    if hasattr(cupy.cuda.Stream, "from_external"):
        return cupy.cuda.Stream.from_external(_Pointer(pointer))
    return cupy.cuda.ExternalStream(pointer)


class _Pointer:
    """A stream handle in the form that CuPy 14 asks for; it deprecates ExternalStream."""

    def __init__(self, pointer: int):
        self.pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


def launch(
    family: str,
    entry: str,
    constants: Mapping[str, int],
    device: torch.device,
    *,
    grid: Sequence[int],
    threads: int,
    args: Sequence[Tensor | np.generic | None],
    shared: int = 0,
    early: bool = False,
) -> None:
    """Launch on torch's current stream of `device`. Tensors go as pointers, None as a null pointer, numbers must be typed.

    `early`: the launch may begin before the one ahead has ended; its kernel calls `settle` before it touches what that wrote.
    """
    refuse_shape(f"{family}.{entry} {dict(constants)}", grid, threads)
    index = device_index(device)
    kernel = compiled(family, entry, tuple(constants.items()), index, shared)
    values = tuple(value if isinstance(value, np.generic) else _pointer(value) for value in args)
    cupy = require_gpu()
    if early and properties(index).major >= 9:
        with torch.cuda.device(index):
            _launch_early(kernel, grid, threads, values, shared, torch.cuda.current_stream(index).cuda_stream)
        return
    with torch.cuda.device(index), cupy.cuda.Device(index), _stream(torch.cuda.current_stream(index).cuda_stream):
        kernel(tuple(map(int, grid)), (threads,), values, shared_mem=shared)


_CTYPES = {np.int32: ctypes.c_int32, np.int64: ctypes.c_int64, np.float32: ctypes.c_float}


def _launch_early(
    kernel: Any, grid: Sequence[int], threads: int, values: Sequence[np.generic], shared: int, stream: int
) -> None:
    """By the driver's own call: CuPy's launch has no attributes."""
    driver: Any = importlib.import_module("cuda.bindings.driver")
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config = driver.CUlaunchConfig()
    sizes = (*map(int, grid), 1, 1)
    config.gridDimX, config.gridDimY, config.gridDimZ = sizes[:3]
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes, config.hStream = shared, stream
    config.attrs, config.numAttrs = [attribute], 1
    kinds = tuple(_CTYPES.get(type(value), ctypes.c_void_p) for value in values)
    function = driver.CUfunction(kernel.kernel.ptr)
    (status,) = driver.cuLaunchKernelEx(config, function, (tuple(value.item() for value in values), kinds), 0)
    if int(status):
        raise RuntimeError(f"cuLaunchKernelEx failed: {status}")


def _pointer(value: Tensor | None) -> np.generic:
    return np.uintp(0 if value is None else value.data_ptr())


def device_index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def counters(device: torch.device) -> Tensor:
    """Zeroed int32 counters for launches on the current stream. Kernels leave them at zero, so nobody clears them again.

    Work on one stream is in order, so its launches share a slot; capture has a slot of its own, so that a graph may be
    replayed beside eager work. Two graphs captured on the same stream must not be replayed at the same time.
    """
    index = device_index(device)
    key = (index, torch.cuda.current_stream(index).cuda_stream, torch.cuda.is_current_stream_capturing())
    slot = _slots.get(key)
    if slot is None:
        with _dealing:
            slot = sum(used[0] == index for used in _slots)
            if slot == _SLOTS:
                raise RuntimeError(f"kernels were launched on more than {_SLOTS} streams of device {index}")
            _slots[key] = slot
    return _arena(index)[slot]


def _arena(index: int) -> Tensor:
    arena = _arenas.get(index)
    if arena is None:
        refuse_in_capture("the counters of the kernels")
        arena = torch.zeros(_SLOTS, _SLOT, dtype=torch.int32, device=torch.device("cuda", index))
        torch.cuda.synchronize(index)  # once, so that every other stream finds zeros
        _arenas[index] = arena
    return arena
