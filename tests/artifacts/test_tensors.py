"""Tensor files: the same as torch.save's, written without memory, read without running anything."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from sedac_cli.artifacts.files import sha256_file
from sedac_cli.artifacts.tensors import load_tensors, read_tensor, save_tensors, write_tensor
from sedac_cli.errors import InputError


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32])
@pytest.mark.parametrize("shape", [(7, 5), (13,), (1, 1)])
def test_a_streamed_tensor_is_what_torch_would_have_saved(tmp_path, dtype, shape):
    value = (torch.randn(shape) * 100).to(dtype)
    payload = raw(value)
    digest = write_tensor(tmp_path / "a.pt", shape, dtype, (payload[i : i + 3] for i in range(0, len(payload), 3)))
    assert digest == sha256_file(tmp_path / "a.pt")
    torch.save(value, tmp_path / "b.pt")
    for mmap in (True, False):
        mine = torch.load(tmp_path / "a.pt", weights_only=True, mmap=mmap)
        assert type(mine) is torch.Tensor
        assert (mine.dtype, mine.shape, mine.stride()) == (dtype, value.shape, value.stride())
        assert torch.equal(mine, value)
    assert torch.equal(read_tensor(tmp_path / "a.pt"), torch.load(tmp_path / "b.pt", weights_only=True))


def test_the_same_bytes_give_the_same_file(tmp_path):
    for name in ("a.pt", "b.pt"):
        write_tensor(tmp_path / name, (4, 2), torch.float32, [bytes(range(32))])
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


@pytest.mark.parametrize("payload", [b"", bytes(31), bytes(33)])
def test_too_few_or_too_many_bytes_leave_no_file(tmp_path, payload):
    with pytest.raises(InputError, match=f"{len(payload)} bytes of data for a tensor of 32"):
        write_tensor(tmp_path / "a.pt", (4, 2), torch.float32, [payload])
    assert list(tmp_path.iterdir()) == []


def test_the_size_of_a_tensor_is_not_asked_of_the_memory(tmp_path):
    """4 TB: the skeleton must be written without an allocation; the data is missing and that is the error."""
    with pytest.raises(InputError, match="0 bytes of data for a tensor of 4096000000000"):
        write_tensor(tmp_path / "a.pt", (10**9, 1024), torch.float32, [])


class Payload:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, zipped):
    made = tmp_path / "made-by-the-pickle"
    torch.save({"proj.weight": Payload(made)}, tmp_path / "bad.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match="holds more than tensors and was refused; nothing in it was run"):
        load_tensors(tmp_path / "bad.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Payload(made)))
    with pytest.raises(InputError, match=r"bare\.pt"):
        load_tensors(tmp_path / "bare.pt")
    assert not made.exists()
    torch.load(tmp_path / "bad.pt", weights_only=False)  # the payload is a real one
    assert made.exists()


def test_what_is_no_tensor_file_is_said_so(tmp_path):
    for name, content in {"empty.pt": b"", "text.pt": b"hello", "cut.pt": None}.items():
        path = tmp_path / name
        if content is None:
            save_tensors(path, torch.zeros(1000))
            path.write_bytes(path.read_bytes()[:2000])
        else:
            path.write_bytes(content)
        for mmap in (True, False):
            with pytest.raises(InputError, match=name):
                load_tensors(path, mmap=mmap)
    save_tensors(tmp_path / "dict.pt", {"a": torch.zeros(1)})
    with pytest.raises(InputError, match="holds a dict, not a tensor"):
        read_tensor(tmp_path / "dict.pt")
    with pytest.raises(InputError, match="no such file"):
        read_tensor(tmp_path / "none.pt")
