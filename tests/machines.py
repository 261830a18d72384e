"""Machines that this one is not: `machine(cupy=12)` is a GPU of CUDA 13 whose CuPy is for CUDA 12, as far as anybody asks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from sedac_cli.gpu import choose
from sedac_cli.gpu import compile as compiling
from sedac_cli.runtime import on_device

CACHES = (compiling.require_gpu, compiling.properties, choose.runs, on_device.packs)
BINDINGS = ("cuda.bindings.driver", "cuda.bindings.runtime")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`cupy`: the CUDA it is built for, or None. `packages`: what pip lists of it."""

    def pretend(
        *, cuda: str | None = "13.0", cupy: int | None = 13, driver: int = 13000, capability: tuple[int, int] = (9, 0),
        bindings: bool = True, packages: tuple[str, ...] | None = None,
    ) -> None:  # fmt: skip
        runtime = SimpleNamespace(runtimeGetVersion=lambda: 1000 * (cupy or 0), driverGetVersion=lambda: driver)
        major, minor = capability
        gpu = SimpleNamespace(name="Pretended GPU", major=major, minor=minor, total_memory=2**34)
        listed = packages or (() if cupy is None else (f"cupy-cuda{cupy}x",))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(compiling, "installed_version", lambda name: "13.6" if name in listed else None)
        module = None if cupy is None else SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))
        monkeypatch.setitem(sys.modules, "cupy", module)  # type: ignore[arg-type]
        for name in BINDINGS:
            monkeypatch.setitem(sys.modules, name, SimpleNamespace() if bindings else None)  # type: ignore[arg-type]
        for cache in CACHES:
            cache.cache_clear()

    yield pretend
    for cache in CACHES:
        cache.cache_clear()
