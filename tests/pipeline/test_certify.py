"""Certified calibration: the statistics against scipy and by counting broken promises; the whole verb on a tiny model."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sedac_cli.errors import UsageError
from sedac_cli.pipeline.certify.bounds import (
    binomial_cdf,
    fixed_sequence,
    hoeffding_bentkus,
    needed_sequences,
    p_value,
    relative_entropy,
)
from sedac_cli.pipeline.certify.harm import Harm

DELTA = 0.05


@pytest.mark.parametrize("n", [1, 2, 7, 150, 3000])
@pytest.mark.parametrize("p", [1e-4, 0.02, 0.5, 0.98])
def test_binomial_cdf_is_scipys(n, p):
    stats = pytest.importorskip("scipy.stats")
    for k in sorted({-1, 0, 1, n // 50, n // 2, n - 1, n, n + 3}):
        assert binomial_cdf(k, n, p) == pytest.approx(stats.binom.cdf(k, n, p), rel=1e-9, abs=1e-300)


def test_hoeffding_bentkus_is_the_papers_formula():
    stats = pytest.importorskip("scipy.stats")
    for losses, a in ((np.zeros(40), 0.1), (np.r_[np.ones(3), np.zeros(97)], 0.1), (np.full(200, 0.013), 0.02)):
        n, mean = len(losses), losses.mean()
        h = relative_entropy(min(mean, a), a)
        expected = min(math.exp(-n * h), math.e * stats.binom.cdf(math.ceil(losses.sum() - 1e-12), n, a))
        assert hoeffding_bentkus(losses, a) == pytest.approx(expected)
    assert hoeffding_bentkus(np.full(50, 0.4), 0.1) == 1.0
    assert hoeffding_bentkus(np.zeros(149), 0.02) <= DELTA < hoeffding_bentkus(np.zeros(148), 0.02)


def test_betting_is_the_product_written_out():
    rng = np.random.default_rng(1)
    losses, a = rng.random(30) * 0.2, 0.15
    capital, best, seen = 1.0, 1.0, []
    for i, loss in enumerate(losses):
        variance = 0.25
        if i:
            means = [(0.5 + sum(seen[: k + 1])) / (k + 2) for k in range(i)]
            variance = (0.25 + sum((x - m) ** 2 for x, m in zip(seen, means, strict=True))) / (i + 1)
        bet = min(0.95 / (1 - a), math.sqrt(2 * math.log(1 / DELTA) / (30 * variance)))
        capital *= 1 - bet * (loss - a)
        best = max(best, capital)
        seen.append(loss)
    assert p_value("wsr", losses, a, DELTA) == pytest.approx(1 / best)


@pytest.mark.parametrize("bound", ["wsr", "hb"])
@pytest.mark.parametrize("kind", ["bernoulli", "rare", "beta", "ppl"])
def test_a_promise_is_broken_at_most_as_often_as_delta(bound, kind):
    """Ladders of 6 rungs, the third and later ones just above the limit: certifying any of those breaks the promise."""
    rng = np.random.default_rng(7)
    draws, n = 2000, 200
    limit = {"bernoulli": 0.2, "rare": 0.02, "beta": 0.1, "ppl": 0.52}[kind]
    means = limit * np.array([0.3, 0.6, 1.001, 1.001, 1.01, 1.1]) if kind != "ppl" else limit + np.array(
        [-0.02, -0.01, 1e-4, 1e-4, 1e-3, 1e-2]
    )  # fmt: skip

    def losses(mean: float) -> np.ndarray:
        if kind in ("bernoulli", "rare"):
            return (rng.random(n) < mean).astype(float)
        if kind == "beta":
            return rng.beta(20 * mean, 20 * (1 - mean), n)
        return np.clip(rng.normal(mean, 0.02, n), 0, 1)

    broken = certified = 0
    for _ in range(draws):
        passed = fixed_sequence((lambda m=m: p_value(bound, losses(m), limit, DELTA) for m in means), DELTA)
        broken += passed > 2
        certified += passed > 0
    margin = 3 * math.sqrt(DELTA * (1 - DELTA) / draws)
    assert broken / draws <= DELTA + margin
    if kind != "rare" and not (kind == "ppl" and bound == "hb"):
        assert certified / draws > 0.9, "vacuous: clearly safe candidates with 200 sequences must be certified"


def test_the_betting_test_is_nearly_exact_where_it_can_be():
    """It does break the promise now and then at the limit itself: a test that never did would waste its confidence."""
    rng = np.random.default_rng(3)
    hits = np.mean([p_value("wsr", (rng.random(200) < 0.25).astype(float), 0.25, DELTA) <= DELTA for _ in range(2000)])
    assert 0.01 < hits <= DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / 2000)


def test_betting_needs_far_less_text_than_hoeffding_for_a_tight_ppl():
    harm = Harm("ppl", 1.02)
    need = {bound: needed_sequences(bound, harm.bound, DELTA, harm.harmless) for bound in ("wsr", "hb")}
    assert need["wsr"] < 100
    assert need["hb"] > 20 * need["wsr"]


@pytest.mark.parametrize("bound", ["wsr", "hb"])
@pytest.mark.parametrize("harm", [Harm("agreement", 0.98), Harm("kl", 0.05), Harm("ppl", 1.1)])
def test_needed_sequences_is_the_smallest(bound, harm):
    n = needed_sequences(bound, harm.bound, DELTA, harm.harmless)
    assert p_value(bound, np.full(n, harm.harmless), harm.bound, DELTA) <= DELTA
    assert p_value(bound, np.full(n - 1, harm.harmless), harm.bound, DELTA) > DELTA


def test_fixed_sequence_stops_and_does_not_look_further():
    looked = []

    def test(p: float):
        return lambda: looked.append(p) or p

    assert fixed_sequence([test(0.01), test(0.05), test(0.2), test(0.001)], DELTA) == 2
    assert looked == [0.01, 0.05, 0.2]
    assert fixed_sequence([], DELTA) == 0


def test_losses_by_hand():
    sums = {
        "tokens": np.array([10.0, 5.0, 4.0]),
        "nll_dense": np.array([20.0, 10.0, 8.0]),
        "nll_gated": np.array([21.0, 20.0, np.nan]),
        "agree": np.array([9.0, 5.0, 1.0]),
        "kl": np.array([0.5, 0.0, 40.0]),
    }
    ppl = Harm.parse("ppl=1.02")
    assert ppl.clip == (-0.5, 0.5)
    assert ppl.losses(sums) == pytest.approx([0.6, 1.0, 1.0])
    assert ppl.clipped_above(sums) == 2
    assert ppl.shown(ppl.bound) == pytest.approx(1.02)
    assert ppl.shown(ppl.harmless) == pytest.approx(1.0)
    agreement = Harm.parse("agreement=0.98")
    assert agreement.losses(sums) == pytest.approx([0.1, 0.0, 0.75])
    assert agreement.bound == pytest.approx(0.02)
    kl = Harm.parse("kl=0.05")
    assert kl.losses(sums) == pytest.approx([0.25, 0.0, 1.0])
    assert (kl.bound, kl.clipped_above(sums)) == (pytest.approx(0.25), 1)
    assert agreement.kept(0.98)
    assert not ppl.kept(1.03)


@pytest.mark.parametrize(
    "text", ["ppl=1", "ppl", "agreement=1", "agreement=1.2", "kl=0", "kl=nan", "bleu=3", "ppl=inf"]
)
def test_limits_that_make_no_sense_are_refused(text):
    with pytest.raises(UsageError):
        Harm.parse(text)


@pytest.mark.parametrize("losses", [[1.2], [-0.1], [math.nan]])
def test_losses_outside_the_unit_interval_are_refused(losses):
    with pytest.raises(UsageError):
        p_value("wsr", np.array(losses), 0.1, DELTA)
