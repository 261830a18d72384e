"""vLLM's CPU platform names no resource by which Ray could place its workers, and so Ray is refused. This one names what a test
tells Ray to have. It is found as a plugin of platforms: `install` makes the folder that goes on PYTHONPATH."""

from __future__ import annotations

import shutil
from pathlib import Path


def platform() -> str:
    return "ray_on_cpu.RayOnCpu"


def install(folder: Path) -> Path:
    info = folder / "ray_on_cpu-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ray_on_cpu\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.platform_plugins]\nray_on_cpu = ray_on_cpu:platform\n")
    shutil.copy(__file__, folder / "ray_on_cpu.py")
    return folder


def __getattr__(name: str) -> type:
    """The class is made when vLLM asks for it: until then, importing this costs nothing and needs no vLLM."""
    if name != "RayOnCpu":
        raise AttributeError(name)
    from vllm.platforms.cpu import CpuPlatform

    return type("RayOnCpu", (CpuPlatform,), {"ray_device_key": "GPU"})
