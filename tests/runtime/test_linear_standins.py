"""A trained stand-in as two linear maps: what the module computes, filled up to a rank that kernels take, and only under its flag."""

from __future__ import annotations

import pytest
import torch

from sedac_cli.runtime.graph.ops import TwinOps
from sedac_cli.runtime.graph.standard import Linear, NotStandardError
from sedac_cli.runtime.graph.standins import LinearStandIns
from sedac_cli.standins import ZeroStandIn
from sedac_cli.standins.lowrank import LowRank, LowRankStandIns

WIDTH = 32
CPU = torch.device("cpu")


def trained(rank: int, seed: int = 0) -> LowRank:
    torch.manual_seed(seed)
    low = LowRank(WIDTH, rank).requires_grad_(False)
    for parameter in low.parameters():
        parameter.normal_(0, 0.3)
    return low


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 6, 8, 12, 16])
def test_it_computes_what_the_module_computes(rank, dtype):
    low = trained(rank)
    standins = LinearStandIns(LowRankStandIns({3: low}), dtype, CPU)
    assert 3 in standins
    assert 2 not in standins
    inward, outward = standins.pairs[3]
    assert inward.weights[0].shape == (-(-rank // 8) * 8, WIDTH)
    assert outward.weights[0].shape == (WIDTH, -(-rank // 8) * 8)
    x, h = torch.randn(5, WIDTH).to(dtype), torch.randn(5, WIDTH).to(dtype)
    expected, out = low(x), torch.full_like(x, 7.0)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    standins(TwinOps(), 3, x, out)
    torch.testing.assert_close(out, expected, **close)
    added = h.clone()
    standins(TwinOps(), 3, x, added, residual=added)
    torch.testing.assert_close(added, h + expected, **close)


@pytest.mark.parametrize("rank", [6, 8, 48])
@pytest.mark.parametrize("residual", [False, True])
def test_it_is_what_the_launches_of_an_mlp_do_when_their_flag_is_0(rank, residual):
    """For any rank, also one above the MLP's inner width."""
    torch.manual_seed(1)
    low, inner, ops = trained(rank), 40, TwinOps()
    first, second = LinearStandIns(LowRankStandIns({0: low}), torch.float32, CPU).instead(0)
    gate, up, down = torch.randn(inner, WIDTH), torch.randn(inner, WIDTH), Linear([torch.randn(WIDTH, inner)], [None])
    x, h = torch.randn(2, WIDTH), torch.randn(2, WIDTH)
    wanted = {0: low(x), 1: (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.weights[0].T}
    for flag, expected in wanted.items():
        need, out = torch.tensor([flag], dtype=torch.int32), h.clone()
        z = ops.gated(x, gate, up, "silu", None, need=need, other=first)
        ops.linear(z, down, residual=out if residual else None, out=out, need=need, other=second)
        torch.testing.assert_close(out, expected + h if residual else expected, rtol=1e-5, atol=1e-4)


def test_its_memory_is_the_modules_where_nothing_is_missing():
    low = trained(16)
    inward, outward = LinearStandIns(LowRankStandIns({0: low}), torch.float32, CPU).pairs[0]
    assert inward.weights[0].data_ptr() == low.a.data_ptr()
    assert outward.weights[0].data_ptr() == low.b.data_ptr()


def test_none_and_unknown_kinds():
    none = LinearStandIns(ZeroStandIn(), torch.float32, CPU)
    assert not none.pairs
    assert none.instead(0) == (None, None)

    class Other:
        def rows(self, layer, x):
            return x

        def cost_per_token(self, layer):
            return 0.0

    with pytest.raises(NotStandardError, match="kind Other"):
        LinearStandIns(Other(), torch.float32, CPU)
