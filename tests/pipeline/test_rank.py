"""Rank statistics equal scipy's, ties included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sedac_cli.pipeline.rank import auc_low, ranks, spearman

# Few distinct values: nearly every list has ties.
lists = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.booleans()), min_size=2, max_size=40)


@settings(deadline=None)
@given(lists)
def test_ranks_and_spearman(rows):
    a, b = (torch.tensor([row[k] for row in rows], dtype=torch.float32) for k in (0, 1))
    assert ranks(a).tolist() == stats.rankdata(a.numpy()).tolist()
    if a.unique().numel() > 1 and b.unique().numel() > 1:
        assert spearman(a, b) == pytest.approx(stats.spearmanr(a.numpy(), b.numpy()).statistic, abs=1e-9)
    else:
        assert spearman(a, b) == 0.0


@settings(deadline=None)
@given(lists)
def test_auc_is_mann_whitney(rows):
    guess = torch.tensor([row[0] for row in rows], dtype=torch.float32)
    low = torch.tensor([row[2] for row in rows])
    if low.any() and not low.all():
        u = stats.mannwhitneyu(guess[~low].numpy(), guess[low].numpy()).statistic
        assert auc_low(guess, low) == pytest.approx(u / (int(low.sum()) * int((~low).sum())), abs=1e-9)
    else:
        assert auc_low(guess, low) == 0.5


def test_a_large_sample_keeps_its_precision():
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(0, 1000, (200_000,), generator=generator).float()
    b = a + 300 * torch.randn(200_000, generator=generator)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a.numpy(), b.numpy()).statistic, abs=1e-9)
    assert auc_low(a, a < 200) == 1.0
    assert auc_low(-a, a < 200) == 0.0
