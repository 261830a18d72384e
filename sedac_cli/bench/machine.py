"""What a run was measured on, and what it took besides time: peak memory, energy, the card's power limit.

with Meter(device) as meter: work()
meter.peak_bytes, meter.joules, meter.at_power_limit        # None where the machine cannot tell
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

Answer = TypeVar("Answer")
STATUS, CLEAR, STAT = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/stat")


def describe_machine() -> dict[str, Any]:
    found: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "busy_before": busy(),
        "gpus": [],
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(index)
            found["gpus"].append({"name": p.name, "memory_bytes": p.total_memory, "sm": f"{p.major}.{p.minor}"})
        found["cuda"] = torch.version.cuda
    return found


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def busy(seconds: float = 0.3) -> float | None:
    """Share of all cores in use by anybody over a moment: a figure taken on a busy machine says so."""

    def read() -> tuple[int, int]:
        times = [int(x) for x in STAT.read_text().split("\n", 1)[0].split()[1:]]
        return sum(times), times[3] + times[4]

    if not STAT.exists():
        return None
    total, idle = read()
    time.sleep(seconds)
    later, later_idle = read()
    return round(1 - (later_idle - idle) / max(1, later - total), 3)


ENERGY_SECONDS = 0.5
"""Shorter runs have no joules: on an H200 the counter stood still over some of 32 ms, and twice as many in others."""


class Meter:
    """Peak memory of the device, or of this process on a CPU; joules of the device while it was open, and whether its power limit
    held its clock down at the end."""

    def __init__(self, device: torch.device):
        self.device = device
        self.peak_bytes: int | None = None
        self.joules: float | None = None
        self.at_power_limit: bool | None = None

    def __enter__(self) -> Meter:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with contextlib.suppress(OSError):
                CLEAR.write_text("5")  # the peak starts anew at what is in use now
        self._before = _joules(self.device)
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.at_power_limit = of_nvml(self.device, at_power_limit)
        if self._before is not None and time.perf_counter() - self._began >= ENERGY_SECONDS:
            after = _joules(self.device)
            self.joules = None if after is None else after - self._before
        if self.device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            self.peak_bytes = _peak_of_process()


def _peak_of_process() -> int | None:
    with contextlib.suppress(OSError):
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


@functools.cache
def nvml_of(index: int) -> tuple[Any, Any] | None:
    """NVML, and its handle of this GPU of torch's; None without nvidia-ml-py, or where it does not know the GPU."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
    except pynvml.NVMLError:
        return None


def at_power_limit(nvml: Any, handle: Any) -> bool:
    """Whether the power limit holds the GPU's clock down at this moment. On an H200 it said so a quarter of a second late."""
    return bool(nvml.nvmlDeviceGetCurrentClocksEventReasons(handle) & nvml.nvmlClocksEventReasonSwPowerCap)


def _joules(device: torch.device) -> float | None:
    """A running total. It moves in steps of up to 100 ms."""
    return of_nvml(device, lambda nvml, handle: float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000)


def of_nvml(device: torch.device, ask: Callable[[Any, Any], Answer]) -> Answer | None:
    """What NVML answers about a GPU; None where there is none to ask, or none that answers."""
    if device.type != "cuda":
        return None
    found = nvml_of(torch.cuda.current_device() if device.index is None else device.index)
    if found is None:
        return None
    nvml, handle = found
    try:
        return ask(nvml, handle)
    except nvml.NVMLError:
        return None
