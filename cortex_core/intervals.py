"""Confidence intervals for what an evaluation reports: an accuracy, a mean, a paired difference.

No resampling and no seed: the same bounds on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Interval(NamedTuple):
    """Confidence bounds around a point estimate: low <= value <= high, all in the unit of the value."""

    low: float
    high: float
    value: float


def wilson(successes: int | float, n: int, *, confidence: float = 0.95) -> Interval:
    """Score interval for a proportion: `successes` right answers among `n` independent examples.

    A fraction of an example is allowed, where several answers about it were averaged; the interval is then that of one
    answer each, never too narrow.

    Wilson (1927), "Probable inference, the law of succession, and statistical inference", Journal of the
    American Statistical Association 22, 209-212; without continuity correction, method 3 in Newcombe (1998),
    Statistics in Medicine 17, 857-872. Unlike the estimate plus and minus two standard errors it stays within
    [0, 1], and keeps a width at n right answers of n, which is where a good memory ends up.

    Raises:
        ValueError: n < 1, successes outside 0..n, or confidence outside (0, 1).
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of n = {n}: n must be at least 1, successes within 0..n")
    z = _normal_quantile(confidence)
    share = successes / n
    centre = share + z * z / (2 * n)
    reach = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    shrink = 1 + z * z / n
    # Exact arithmetic keeps share and limits in order; rounding may miss by one unit in the last place.
    low = max(0.0, min(share, (centre - reach) / shrink))
    high = min(1.0, max(share, (centre + reach) / shrink))
    return Interval(low, high, share)


def mean_interval(
    values: Sequence[float] | NDArray[np.floating],
    *,
    lowest: float = -math.inf,
    highest: float = math.inf,
    confidence: float = 0.95,
) -> Interval:
    """Student's t interval for the mean of `values` [n], one per independent example, in their own unit.

    Student (1908), "The probable error of a mean", Biometrika 6, 1-25. `lowest` and `highest` are the limits
    of the metric itself; bounds are cut there. A single value says nothing about spread: its interval is all
    that the limits allow. For a paired comparison pass the differences. For a ratio of perplexities pass the
    differences in nats per token over equally long stretches of text, and take `exp` of all three numbers.

    Raises:
        ValueError: no values, a value that is not finite, or confidence outside (0, 1).
    """
    sample = np.asarray(values, dtype=np.float64).ravel()
    if sample.size == 0 or not np.isfinite(sample).all():
        raise ValueError(f"a mean needs at least one value and only finite ones, got {sample.size} values")
    mean = float(sample.mean())
    quantile = student_quantile(sample.size - 1, confidence)
    if sample.size == 1:
        return Interval(lowest, highest, mean)
    half = quantile * float(sample.std(ddof=1)) / math.sqrt(sample.size)
    return Interval(max(lowest, mean - half), min(highest, mean + half), mean)


def paired_difference(
    first: Sequence[bool] | NDArray[np.bool_],
    second: Sequence[bool] | NDArray[np.bool_],
    *,
    confidence: float = 0.95,
) -> Interval:
    """Score interval for accuracy(first) - accuracy(second) on the same examples, both [n] bool; in [-1, 1].

    Newcombe (1998), "Improved confidence intervals for the difference between binomial proportions based on
    paired data", Statistics in Medicine 17, 2635-2650, method 10: the Wilson bounds of both accuracies,
    squared and added with the correlation between the two. It may exclude 0 where the intervals of the two
    accuracies overlap, and unlike McNemar's test it also says how large the difference is.

    Raises:
        ValueError: different lengths, no examples, or confidence outside (0, 1).
    """
    a, b = np.asarray(first, dtype=bool).ravel(), np.asarray(second, dtype=bool).ravel()
    if a.size != b.size or a.size == 0:
        raise ValueError(f"a paired difference needs the same examples twice, got {a.size} and {b.size}")
    both, neither = int((a & b).sum()), int((~a & ~b).sum())
    only_first, only_second = int((a & ~b).sum()), int((~a & b).sum())
    n = int(a.size)
    one = wilson(both + only_first, n, confidence=confidence)
    two = wilson(both + only_second, n, confidence=confidence)
    phi = _correlation(both, only_first, only_second, neither)
    difference = (only_first - only_second) / n
    below = _root(one.value - one.low, two.high - two.value, phi)
    above = _root(one.high - one.value, two.value - two.low, phi)
    return Interval(max(-1.0, difference - below), min(1.0, difference + above), difference)


def _correlation(both: int, only_first: int, only_second: int, neither: int) -> float:
    """Newcombe's phi of a 2x2 table: 0 when a margin is empty, continuity-corrected where it is positive."""
    n = both + only_first + only_second + neither
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    if margins == 0:
        return 0.0
    numerator = float(both * neither - only_first * only_second)
    if numerator > 0:
        numerator = max(numerator - n / 2, 0.0)
    return numerator / math.sqrt(margins)


def _root(x: float, y: float, phi: float) -> float:
    """Length of the third side, sqrt(x² - 2 phi x y + y²), with rounding kept from making it imaginary."""
    return math.sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))


def _normal_quantile(confidence: float) -> float:
    """Two-sided quantile z of the normal distribution: P(|Z| < z) = confidence."""
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence = {confidence} must lie strictly between 0 and 1")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def student_quantile(freedom: int, confidence: float) -> float:
    """Two-sided quantile of Student's t with `freedom` degrees of freedom (0 gives infinity), to 1e-6.

    Bisection on the finite series of `_student_mass`; beyond 200 degrees of freedom the expansion about the
    normal quantile (Abramowitz & Stegun 26.7.5, first two terms).
    """
    z = _normal_quantile(confidence)
    if freedom == 0:
        return math.inf
    if freedom > 200:
        return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    low, high = z, 2 * z + 1
    while _student_mass(high, freedom) < confidence:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_mass(middle, freedom) < confidence else (low, middle)
    return high


def _student_mass(t: float, freedom: int) -> float:
    """P(|T| < t) for an integer number of degrees of freedom: Abramowitz & Stegun (1964), 26.7.3 and 4."""
    theta = math.atan(t / math.sqrt(freedom))
    cos, sin = math.cos(theta), math.sin(theta)
    odd = freedom % 2
    term = cos if odd else 1.0
    total = 0.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= cos * cos * k / (k + 1)
    return 2 / math.pi * (theta + sin * total) if odd else sin * total
