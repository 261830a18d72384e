"""What the kernel tests and the kernel benchmark share: inputs, the twins' answers, and how far off a kernel may be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sedac_cli.gates.learned import Router
from sedac_cli.gpu import compile

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALVES = (torch.float16, torch.bfloat16)
STEP = {torch.float32: 2e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}
"""Of the largest value: two roundings of the dtype (sums in another order may fall on the other side of one)."""

ENTROPY_BITS = 5e-4
"""float32 sums of up to 262144 terms in another order, ex2.approx (2 ulp): seen 1e-4 on logits of scale 4."""
CONFIDENCE = 2e-5
RISK = {"split": 2e-4, "plain": 3e-2}
"""split: float32 additions in another order. plain: weights rounded to bfloat16, 2^-9 each."""


class Probe(nn.Module):
    """The shape of LREProbe with norms and heads that are not at their defaults."""

    def __init__(self, width: int, rank: int = 64, bias: bool = True):
        super().__init__()
        self.proj, self.norm, self.head = nn.Linear(width, rank, bias=bias), nn.LayerNorm(rank), nn.Linear(rank, 1)
        nn.init.normal_(self.norm.weight, 1.0, 0.3)
        nn.init.normal_(self.norm.bias, 0.0, 0.3)
        nn.init.normal_(self.head.weight, 0.0, 0.3)
        self.requires_grad_(False)


def router_of(width: int, units: int = 16, device: str = "cpu") -> Router:
    """A learned gate's router with random weights: scores of about unit size."""
    router = Router(width, units).requires_grad_(False)
    for weights in (router.weight, router.inner):
        nn.init.normal_(weights, 0.0, width**-0.5)
    nn.init.normal_(router.outer)
    nn.init.normal_(router.bias)
    return router.to(device)


def logits_of(rows: int, vocab: int, dtype: torch.dtype, offset: int = 0, device: str = "cuda") -> Tensor:
    """[rows, vocab] random logits; with an offset, a view whose rows start off 16 bytes and are further apart than wide."""
    return (torch.randn(rows, vocab + offset, device=device) * 4).to(dtype)[:, offset:]


def assert_close(name: str, found: Tensor, expected: Tensor, limit: float) -> None:
    """Same NaNs, and everything else within `limit`; says where and by how much otherwise."""
    assert found.shape == expected.shape, f"{name}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    if found.numel() == 0:
        return
    assert torch.equal(found.isnan(), expected.isnan()), (
        f"{name}: NaN in {found.isnan().sum()} rows, expected {expected.isnan().sum()}"
    )
    gap = (found.double() - expected.double()).abs().nan_to_num(0.0, posinf=float("inf"))
    worst = int(gap.argmax())
    assert gap.max() <= limit, (
        f"{name}: off by {gap.max():.3g} (limit {limit:g}) at {worst} of {gap.numel()}: "
        f"{found.flatten()[worst]:.7g}, expected {expected.flatten()[worst]:.7g}; {(gap > limit).sum()} entries off"
    )


def close(name: str, found: Tensor, expected: Tensor) -> None:
    limit = STEP[found.dtype] * max(1.0, float(expected.float().abs().max()) if expected.numel() else 1.0)
    assert_close(name, found.float(), expected.float(), limit)


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.float() for t in tensors]


def agree_away_from(
    name: str, found: Tensor, expected: Tensor, value: Tensor, limit: float | Tensor, margin: float
) -> None:
    """Decisions are equal wherever the compared value is not within rounding of its limit."""
    clear = ~((value - limit).abs() <= margin)
    wrong = (found.bool() != expected.bool()) & clear
    assert not wrong.any(), f"{name}: {int(wrong.sum())} of {wrong.numel()} decisions differ away from the limit"


def poison(*tensors: Tensor) -> None:
    """Fill outputs with what no kernel would write, so that an unwritten entry is seen."""
    for tensor in tensors:
        if tensor.dtype == torch.bool:
            tensor.view(torch.uint8).fill_(0xAA)
        elif tensor.is_floating_point():
            tensor.fill_(-777.0)
        else:
            tensor.fill_(-777)


@pytest.fixture
def counters_come_back() -> Iterator[None]:
    """Seeded inputs; afterwards every counter is back at zero, or the next launch would never finish a row."""
    torch.manual_seed(0)
    yield
    torch.cuda.synchronize()
    assert not any(arena.any() for arena in compile._arenas.values()), "a kernel left a counter behind"


def captured(work: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """(graph, what `work` returned inside it); warmed up once before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = work()
    return graph, out
