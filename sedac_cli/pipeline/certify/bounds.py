"""p-values for "the mean loss is above the limit", and the test in fixed order built on them. Pure numbers, no model.

Always true: for independent losses in [0, 1] whose mean is at least `limit`, p <= delta happens with probability at most
delta, whatever their distribution and number. A small p is evidence that the mean is below the limit.

    p_value("wsr", losses, limit=0.02, delta=0.05)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from sedac_cli.errors import UsageError

Array = np.ndarray[Any, Any]
BOUNDS = ("wsr", "hb")
MOST = 0.95
"""Largest bet as a share of the one that a single loss of 1 would ruin. Closer to 1 is no better: with 0.99 the power on
0/1 losses of mean 0.01 against a limit of 0.02 fell from 0.33 to 0.29 (400 draws of 500), on smooth losses it rose by 0.04."""
MAX_SEQUENCES = 10_000_000


def binomial_cdf(k: int, n: int, p: float) -> float:
    """P(Bin(n, p) <= k)."""
    if k < 0:
        return 0.0
    if k >= n:
        return 1.0
    j = np.arange(k + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    terms = log_factorial[n] - log_factorial[j] - log_factorial[n - j] + j * math.log(p) + (n - j) * math.log1p(-p)
    top = float(terms.max())
    return min(1.0, math.exp(top + math.log(float(np.exp(terms - top).sum()))))


def relative_entropy(a: float, b: float) -> float:
    """h1(a, b) = a log(a/b) + (1-a) log((1-a)/(1-b)), of two coins; 0 log 0 = 0."""
    first = a * math.log(a / b) if a > 0 else 0.0
    return first + ((1 - a) * math.log((1 - a) / (1 - b)) if a < 1 else 0.0)


def hoeffding_bentkus(losses: Array, limit: float) -> float:
    """min(exp(-n h1(min(R, a), a)), e P(Bin(n, a) <= ceil(n R))), R the mean of n losses, a the limit."""
    n = len(losses)
    total = math.fsum(losses)
    hoeffding = math.exp(-n * relative_entropy(min(total / n, limit), limit))
    bentkus = math.e * binomial_cdf(math.ceil(total), n, limit)
    return min(1.0, hoeffding, bentkus)


def betting(losses: Array, limit: float, delta: float) -> float:
    """1 / the largest capital of a gambler who bets, loss by loss, that the mean is below the limit.

    Capital K_t = prod (1 - b_i (loss_i - limit)). Each b_i depends on earlier losses only and lies in [0, 1/(1 - limit)),
    so under a mean >= limit K is a non-negative supermartingale from 1, and by Ville's inequality it ever reaches
    1/delta with probability <= delta. Bets: b_i = sqrt(2 log(1/delta) / (n s2_{i-1})), s2 the running variance.
    """
    n = len(losses)
    count = np.arange(2, n + 2)
    mean = (0.5 + np.cumsum(losses)) / count
    variance = (0.25 + np.cumsum((losses - mean) ** 2)) / count
    before = np.concatenate([[0.25], variance[:-1]])
    bets = np.minimum(MOST / (1 - limit), np.sqrt(2 * math.log(1 / delta) / (n * before)))
    capital = np.cumsum(np.log1p(-bets * (losses - limit)))
    return min(1.0, math.exp(-float(capital.max())))


def p_value(bound: str, losses: Array, limit: float, delta: float) -> float:
    """`wsr`: betting, adapts to the variance. `hb`: Hoeffding-Bentkus, of the mean alone."""
    losses = np.asarray(losses, dtype=np.float64)
    if bound not in BOUNDS:
        raise UsageError(f"bound '{bound}' is not known", hint=" or ".join(BOUNDS))
    if not 0 < limit < 1 or not 0 < delta < 1:
        raise UsageError(f"a limit of {limit} and a risk of {delta} must both lie between 0 and 1")
    if len(losses) == 0:
        return 1.0
    if not (np.isfinite(losses).all() and losses.min() >= 0 and losses.max() <= 1):
        raise UsageError("losses must lie in [0, 1]")
    return betting(losses, limit, delta) if bound == "wsr" else hoeffding_bentkus(losses, limit)


def needed_sequences(bound: str, limit: float, delta: float, harmless: float = 0.0) -> int:
    """The fewest sequences with which a gate that does no harm at all (every loss = `harmless`) could be certified."""

    def enough(n: int) -> bool:
        return p_value(bound, np.full(n, harmless), limit, delta) <= delta

    high = 1
    while not enough(high):
        high *= 2
        if high > MAX_SEQUENCES:
            raise UsageError(f"no text is long enough: more than {MAX_SEQUENCES:,} sequences", hint="a looser limit")
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    # hb counts whole losses and is a saw tooth in n: a shorter text just below may do as well
    return next(n for n in range(max(1, high - high // 10), high + 1) if enough(n))


def fixed_sequence(p_values: Iterable[float] | Iterable[Callable[[], float]], delta: float) -> int:
    """How many hypotheses, in the order given, are rejected before the first that is not; later ones are not looked at.

    Each is tested at the full delta: a false rejection needs the first true hypothesis of the order to be rejected.
    """
    passed = 0
    for p in p_values:
        if (p() if callable(p) else p) > delta:
            break
        passed += 1
    return passed
