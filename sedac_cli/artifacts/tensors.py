"""Tensor files: read without unpickling anything but tensors, written without holding them in memory.

A large tensor is written as the `.pt` that `torch.save` would make, its bytes streamed into the reserved place.

    digest = write_tensor(path, shape=(n, 384), dtype=torch.float32, chunks=read_raw(...))
    states = read_tensor(path)          # memory-mapped
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sedac_cli.artifacts.files import atomic_file, sha256_file
from sedac_cli.errors import InputError


def write_tensor(path: Path, shape: tuple[int, ...], dtype: torch.dtype, chunks: Iterable[bytes]) -> str:
    """Stream raw row-major bytes into a file that plain `torch.load` reads; returns its sha256."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with atomic_file(path) as handle:
        # A fake tensor has no memory however large it is; skip_data leaves its bytes as a hole in the file.
        with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(torch.empty(shape, dtype=dtype), handle)
        end = handle.tell()
        handle.flush()
        with FakeTensorMode():
            skeleton = torch.load(handle.name, weights_only=True)
        storage = skeleton.untyped_storage()
        start: int = storage._checkpoint_offset  # type: ignore[attr-defined]
        handle.seek(start)
        written = 0
        for chunk in chunks:
            written += handle.write(chunk)
        expected = torch.empty((), dtype=dtype).element_size() * int(torch.Size(shape).numel())
        if written != expected:
            raise InputError(f"{path}: {written} bytes of data for a tensor of {expected}")
        handle.seek(end)
        handle.flush()
        digest = sha256_file(Path(handle.name))
    return digest


def save_tensors(path: Path, value: Any) -> str:
    """`torch.save` of a tensor or a state dict, atomically; returns its sha256."""
    with atomic_file(path) as handle:
        torch.save(value, handle)
    return sha256_file(path)


def load_tensors(path: Path, mmap: bool = False) -> Any:
    """`torch.load` that never runs code from the file and explains what is wrong with it."""
    try:
        return torch.load(path, weights_only=True, mmap=mmap, map_location="cpu")
    except FileNotFoundError:
        raise InputError(f"no such file: {path}") from None
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds more than tensors and was refused; nothing in it was run: {_first_line(error)}"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise InputError(f"{path} is not a readable tensor file: {_first_line(error)}") from None


def read_tensor(path: Path) -> Tensor:
    """One memory-mapped tensor."""
    value = load_tensors(path, mmap=True)
    if not isinstance(value, Tensor):
        raise InputError(f"{path} holds a {type(value).__name__}, not a tensor")
    return value


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
