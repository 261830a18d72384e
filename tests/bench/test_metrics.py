"""Figures from samples, checked by hand and against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from sedac_cli.bench.metrics import Run, interval, paired, percentiles, spread, summarize


def test_paired_is_pair_by_pair():
    found = paired([2.0, 30.0, 4.0], [1.0, 10.0, 4.0])
    assert (found["median"], found["min"], found["max"], found["n"]) == (2.0, 1.0, 3.0, 3)
    assert (found["low"], found["high"]) == (None, None)  # three pairs have no interval of 95 %


def test_an_interval_needs_five_pairs():
    """Of n samples the extremes alone hold the median with probability 1 - 2^(1-n). Drawn anew, three or more of five are the least
    one in 5.8 % of cases: more than the 2.5 % of each end, so the interval of five is from end to end."""
    own = [1.0] * 5
    assert paired([1.0, 2.0, 3.0, 4.0], own[:4])["low"] is None
    found = paired([1.0, 2.0, 3.0, 4.0, 5.0], own)
    assert (found["low"], found["median"], found["high"]) == (1.0, 3.0, 5.0)
    narrow = paired([1.0, *[2.0 + i / 100 for i in range(20)], 5.0], [1.0] * 22)
    assert narrow["low"] > 1.9
    assert narrow["high"] < 2.3


def test_the_interval_of_the_median_is_scipys():
    values = np.random.default_rng(3).normal(10, 2, size=40)
    ours = interval(values)
    theirs = stats.bootstrap((values,), np.median, method="percentile", n_resamples=4000, rng=1).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.15)


def test_percentiles():
    assert percentiles([]) is None
    assert percentiles(range(101)) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}
    assert spread([]) is None


def run(**values) -> Run:
    return Run(**({"seconds": 2.0, "prompt_tokens": 100, "new_tokens": 20, "prefill_seconds": 0.5, "decode_seconds": 1.0,
                   "ttft": [0.5], "itl": [0.1, 0.2], "sequences": 2} | values))  # fmt: skip


def test_prefill_and_decode_apart():
    found = summarize([run(), run()])
    assert found["tokens_per_second"]["median"] == 10
    assert found["decode_tokens_per_second"]["median"] == 18  # the first token of each sequence is the prompt pass's
    assert found["prefill_tokens_per_second"]["median"] == 200
    assert found["itl_seconds"]["p50"] == pytest.approx(0.15)
    assert found["peak_bytes"] is None
    assert found["joules_per_token"] is None
    assert found["at_power_limit"] is None


def test_runs_at_the_power_limit_are_counted_among_those_that_know():
    found = summarize([run(), run(at_power_limit=True), run(at_power_limit=False), run(at_power_limit=True)])
    assert found["at_power_limit"] == {"runs": 2, "of": 3}
    assert summarize([run(at_power_limit=False)])["at_power_limit"] == {"runs": 0, "of": 1}


def test_skips_per_layer_are_weighted_by_tokens():
    found = summarize(
        [run(skipped_per_layer=[0, 10], decided_tokens=10), run(skipped_per_layer=[0, 0], decided_tokens=30)]
    )
    assert found["skip_ratio_per_layer"] == [0, 0.25]
    assert found["skip_ratio"] == 0.125


def test_acceptance_and_recovery():
    drafts = {"proposed": 10, "accepted": 5, "verify_steps": 4, "verify_tokens": 9, "break_even_measured": 0.4,
              "break_even_flops": 0.6, "near_ties": 1, "identical": 2, "sequences": 2}  # fmt: skip
    found = summarize([run(drafts=drafts), run(drafts=drafts | {"accepted": 7, "verify_tokens": 11})])["drafts"]
    assert found["ar"] == 12 / 20
    assert found["trr"] == 12 / 20
    assert found["tokens_per_step"] == 20 / 8
    assert (found["identical"], found["compared"]) == (4, 4)
