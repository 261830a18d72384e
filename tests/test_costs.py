"""FLOPs counted by hand."""

from __future__ import annotations

import pytest
from conftest import tiny_model

from sedac_cli.costs import Costs, model_costs
from sedac_cli.structure import find_decoder


def test_a_llama():
    """hidden 32, intermediate 48, 4 heads and 2 key heads of 8, 97 words, context 64."""
    costs = model_costs(find_decoder(tiny_model("llama")), context=64)
    mlp = 3 * 2 * 32 * 48
    projections = 2 * (32 * 32 + 32 * 16 + 32 * 16 + 32 * 32)
    scores = 2 * (2 * 4 * 8 * 64) / 2  # queries x keys and weights x values, half of the context on average
    assert costs.mlp == (mlp,) * 4
    assert costs.mixer == (projections + scores,) * 4
    assert costs.head == 2 * 32 * 97
    assert costs.total == 4 * (mlp + projections + scores) + 2 * 32 * 97


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("mixtral", {"num_local_experts": 4}),
        ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 48, "head_dim": 8}),
    ],
)
def test_of_the_experts_only_those_a_token_visits(family, more):
    model = tiny_model(family, num_experts_per_tok=2, **more)
    costs = model_costs(find_decoder(model), context=64)
    router = 2 * 32 * 4
    assert costs.mlp == (router + 2 * (3 * 2 * 32 * 48),) * 4


def test_a_shared_expert_beside_the_experts_module_always_runs_and_is_counted():
    """GraniteMoeShared: `shared_mlp` (width 24) stands beside `block_sparse_moe`, which is what can be skipped."""
    model = tiny_model("granitemoeshared", num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=24)
    costs = model_costs(find_decoder(model), context=64)
    router, shared = 2 * 32 * 4, 3 * 2 * 32 * 24
    attention = 2 * (32 * 32 + 32 * 16 + 32 * 16 + 32 * 32) + 2 * (2 * 4 * 8 * 64) / 2
    assert costs.mlp == (router + 2 * (3 * 2 * 32 * 48),) * 4
    assert costs.mixer == (attention + shared,) * 4


def test_savings_are_a_share_of_the_whole_and_gates_and_standins_are_paid():
    costs = Costs(mlp=(60.0, 60.0), mixer=(20.0, 20.0), head=40.0)
    assert costs.total == 200
    assert costs.saved([0.0, 0.0]) == 0.0
    assert costs.saved([0.5, 1.0]) == pytest.approx(90 / 200)
    assert costs.saved([0.5, 1.0], gate={0: 6.0, 1: 4.0}) == pytest.approx(80 / 200)
    assert costs.saved([0.5, 1.0], standin=[10.0, 20.0]) == pytest.approx((90 - 5 - 20) / 200)
    assert costs.saved([0.0, 0.0], gate={0: 10.0}) == pytest.approx(-0.05)  # deciding without skipping is a loss
    with pytest.raises(ValueError, match="zip"):
        costs.saved([0.5])
