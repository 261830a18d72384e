"""A trained stand-in as two linear maps: what the module computes, filled up to a rank that kernels take, and only under its flag."""

from __future__ import annotations

import pytest
import torch

from sedac_cli.errors import InputError
from sedac_cli.runtime.graph.ops import TwinOps
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


def test_it_works_where_the_flag_has_closed_the_mlp_and_touches_nothing_elsewhere():
    standins = LinearStandIns(LowRankStandIns({0: trained(8)}), torch.float32, CPU)
    x = torch.randn(2, WIDTH)
    for flag, works in ((0, True), (1, False)):
        out = torch.full_like(x, 7.0)
        standins(TwinOps(), 0, x, out, need=torch.tensor([flag], dtype=torch.int32))
        assert bool((out != 7.0).all()) == works
        assert works or bool((out == 7.0).all())


def test_its_memory_is_the_modules_where_nothing_is_missing():
    low = trained(16)
    inward, outward = LinearStandIns(LowRankStandIns({0: low}), torch.float32, CPU).pairs[0]
    assert inward.weights[0].data_ptr() == low.a.data_ptr()
    assert outward.weights[0].data_ptr() == low.b.data_ptr()


def test_none_and_unknown_kinds():
    assert not LinearStandIns(ZeroStandIn(), torch.float32, CPU).pairs

    class Other:
        def rows(self, layer, x):
            return x

        def cost_per_token(self, layer):
            return 0.0

    with pytest.raises(InputError, match="kind Other"):
        LinearStandIns(Other(), torch.float32, CPU)
