"""What a model's code brings from the host in a captured step is there in every replay, and what it asks the device for is no constant."""

from __future__ import annotations

import pytest
import torch

from sedac_cli.errors import InputError
from sedac_cli.runtime.graph.capture import captured

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing can be captured here"),
]
LEFT_ON_HOST = torch.linspace(-1, 1, 8)


def columns_set(x):
    x = x.clone()
    x[:, [1, 3]] = 7
    return x


def written_into(x):
    total = torch.tensor(1.0, device=x.device)
    total += x.sum()
    return total


STEPS = {
    "a number": lambda x: x * torch.tensor(2.5, device=x.device),
    "a list of numbers": lambda x: x * torch.tensor([1, 2, 3, 4, 5, 6, 7, 8], device=x.device, dtype=x.dtype),
    "a buffer on the host": lambda x: x + LEFT_ON_HOST.to(x.device) + LEFT_ON_HOST.cuda() + LEFT_ON_HOST.type_as(x),
    "a list of columns": lambda x: x[:, [-2, 0]],
    "columns on the host": lambda x: x[..., torch.tensor([3, 1])],
    "columns that are set": columns_set,
    "a column": lambda x: x[:, torch.tensor(3)],
    "a number that is written into": written_into,
}


@pytest.mark.parametrize("name", STEPS)
def test_a_constant_of_the_host(name):
    x = torch.zeros(4, 8, device="cuda")
    out = torch.empty_like(STEPS[name](x))

    def step():
        out.copy_(STEPS[name](x))

    replay = captured(step, step, name)
    for seed in range(3):
        x.copy_(torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)))
        torch.cuda.empty_cache()
        replay()
        assert torch.equal(out, STEPS[name](x))


def test_no_stream_that_is_captured_brings_it():
    """torch deals streams from a ring of 32."""
    x = torch.ones(2, device="cuda")
    for turn in range(70):
        out = torch.zeros(2, device="cuda")
        replay = captured(
            lambda: None, lambda out=out, turn=turn: out.copy_(x * torch.tensor(float(turn), device="cuda")), "a model"
        )
        replay()
        assert out.tolist() == [turn, turn]


@pytest.mark.parametrize(
    "step",
    [lambda x: torch.tensor(float(x[0, 0]), device=x.device), lambda x: torch.tensor([1.0, x[0, 0]], device=x.device),
     lambda x: torch.tensor(x[0].tolist(), device=x.device), lambda x: x[:, x[0].long().cpu()]],
)  # fmt: skip
def test_what_the_device_computed_is_none(step):
    x = torch.zeros(4, 8, device="cuda")
    with pytest.raises(InputError, match="cannot be captured"):
        captured(lambda: step(x), lambda: step(x), "a model")
