"""The rejection rule gives the full model's distribution, whatever the drafts; a wrong rule does not pass the same test."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from sedac_cli.runtime import rejection
from sedac_cli.runtime.rejection import accept_greedy, accept_sampled, draw, residual

P = torch.tensor([[0.5, 0.2, 0.2, 0.1, 0.0], [0.1, 0.1, 0.1, 0.3, 0.4]], dtype=torch.float64)
Q = torch.tensor([0.1, 0.5, 0.1, 0.2, 0.1], dtype=torch.float64)
DRAWS = 20_000
ALPHA = 1e-4


def first_tokens(copied: bool, draws: int = DRAWS) -> list[int]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(draws):
        token = 1 if copied else draw(Q, generator)
        kept, after = accept_sampled(P, [None if copied else Q], [token], generator)
        found.append(token if kept else after)
    return found


def p_value(tokens: list[int], p: torch.Tensor) -> float:
    counts = torch.bincount(torch.tensor(tokens), minlength=len(p))
    possible = p > 0
    if int(counts[~possible].sum()):
        return 0.0
    return float(stats.chisquare(counts[possible].numpy(), (p[possible] * len(tokens)).numpy()).pvalue)


@pytest.mark.parametrize("copied", [False, True])
def test_the_first_token_is_distributed_as_p(copied):
    assert p_value(first_tokens(copied), P[0]) > ALPHA


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("residual", lambda p, q, token: p),  # drawn from p where p - q is due
        ("residual", lambda p, q, token: torch.ones_like(p)),
    ],
)
def test_a_wrong_rule_is_found_out(monkeypatch, name, wrong):
    monkeypatch.setattr(rejection, name, wrong)
    assert p_value(first_tokens(copied=False), P[0]) < ALPHA


def test_accepting_everything_is_found_out():
    generator = torch.Generator().manual_seed(1)
    assert p_value([draw(Q, generator) for _ in range(DRAWS)], P[0]) < ALPHA


def test_after_accepted_drafts_one_more_comes_from_p():
    generator = torch.Generator().manual_seed(2)
    made = [accept_sampled(P, [P[0]], [0], generator) for _ in range(DRAWS)]
    assert {kept for kept, _ in made} == {1}  # p = q: nothing is ever refused
    assert p_value([token for _, token in made], P[1]) > ALPHA


def test_an_impossible_draft_never_stands():
    assert all(accept_sampled(P, [Q], [4])[0] == 0 for _ in range(200))


def test_residual_is_where_p_exceeds_q():
    assert torch.allclose(residual(P[0], Q, 1), torch.tensor([0.4, 0.0, 0.1, 0.0, 0.0], dtype=torch.float64))
    assert residual(P[0], None, 0).tolist() == pytest.approx([0, 0.2, 0.2, 0.1, 0])
    assert torch.equal(residual(Q, Q, 0), Q)  # rounding left nothing to draw from


def test_greedy_stops_at_the_first_difference():
    assert accept_greedy([4, 5, 6], [4, 5]) == (2, 6)
    assert accept_greedy([4, 5, 6], [4, 9]) == (1, 5)
    assert accept_greedy([4], []) == (0, 4)
