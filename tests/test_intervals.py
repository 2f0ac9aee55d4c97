from __future__ import annotations

import math
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex_core.intervals import mean_interval, paired_difference, wilson

counts = st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
tables = st.tuples(*[st.integers(0, 60)] * 4).filter(any)
samples = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=40)


def outcomes(both: int, only_first: int, only_second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    sizes = (both, only_first, only_second, neither)
    return np.repeat([True, True, False, False], sizes), np.repeat([True, False, True, False], sizes)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17, 857-872, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_agrees_with_the_published_values(successes: int, n: int, low: float, high: float) -> None:
    found = wilson(successes, n)
    assert found == pytest.approx((low, high, successes / n), abs=5e-5)
    assert found[:2] == (found.low, found.high)


@given(counts, st.floats(0.5, 0.999))
def test_wilson_lies_in_0_to_1_around_the_share(count: tuple[int, int], confidence: float) -> None:
    low, high, value = wilson(*count, confidence=confidence)
    assert 0.0 <= low <= value == count[0] / count[1] <= high <= 1.0
    assert low < high


@given(counts, st.integers(2, 9))
def test_wilson_shrinks_with_n_and_widens_with_confidence(count: tuple[int, int], times: int) -> None:
    def width(successes: int, n: int, confidence: float = 0.95) -> float:
        found = wilson(successes, n, confidence=confidence)
        return found.high - found.low

    assert width(count[0] * times, count[1] * times) < width(*count) < width(*count, 0.99)


@given(counts)
def test_wilson_of_the_wrong_answers_is_the_mirror_image(count: tuple[int, int]) -> None:
    right, wrong = wilson(*count), wilson(count[1] - count[0], count[1])
    assert (1 - wrong.high, 1 - wrong.low) == pytest.approx(right[:2], abs=1e-12)


@pytest.mark.parametrize("n", [10, 50, 200])
def test_wilson_covers_the_truth_as_often_as_it_says(n: int) -> None:
    """Exact coverage, averaged over true accuracies: no simulation."""
    intervals = [wilson(k, n) for k in range(n + 1)]

    def coverage(truth: float) -> float:
        return sum(
            comb(n, k) * truth**k * (1 - truth) ** (n - k)
            for k, found in enumerate(intervals)
            if found.low <= truth <= found.high
        )

    assert np.mean([coverage(truth) for truth in np.linspace(0.02, 0.98, 97)]) == pytest.approx(0.95, abs=0.012)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"{successes} successes of n = {n}"):
        wilson(successes, n)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_a_confidence_is_a_share(confidence: float) -> None:
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        wilson(1, 2, confidence=confidence)


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    # Student's t, 97.5 % point, as in any table.
    [(1, 12.7062), (2, 4.3027), (4, 2.7764), (10, 2.2281), (30, 2.0423), (120, 1.9799), (1000, 1.9623)],
)
def test_the_mean_interval_uses_the_quantiles_of_the_tables(freedom: int, quantile: float) -> None:
    sample = np.random.default_rng(freedom).normal(size=freedom + 1)
    found = mean_interval(sample)
    error = sample.std(ddof=1) / math.sqrt(len(sample))
    assert (found.high - found.value) / error == pytest.approx(quantile, abs=6e-5)
    assert (found.value - found.low) / error == pytest.approx(quantile, abs=6e-5)


def test_the_mean_interval_of_a_worked_example() -> None:
    assert mean_interval([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx((1.0368, 4.9632, 3.0), abs=1e-4)


@given(samples, st.floats(-100, 100))
def test_the_mean_interval_moves_with_the_values(values: list[float], shift: float) -> None:
    here, there = mean_interval(values), mean_interval([value + shift for value in values])
    assert here.low <= here.value <= here.high
    assert there == pytest.approx(tuple(bound + shift for bound in here), abs=1e-3)


def test_the_mean_interval_covers_the_truth_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(loc=3.0, size=(2000, 5))
    covered = [low <= 3.0 <= high for low, high, _ in map(mean_interval, draws)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)


def test_one_value_says_nothing_about_spread() -> None:
    assert mean_interval([0.4]) == (-math.inf, math.inf, 0.4)
    assert mean_interval([0.4], lowest=0.0, highest=1.0) == (0.0, 1.0, 0.4)
    assert mean_interval([0.99, 0.95, 1.0], lowest=0.0, highest=1.0).high == 1.0


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_a_mean_of_nothing_or_of_nan_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="only finite ones"):
        mean_interval(values)


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        ((36, 12, 2, 0), 0.0569, 0.3404),  # Newcombe (1998), Statistics in Medicine 17, 2635-2650, method 10
        ((1, 1, 7, 12), -0.507, -0.026),  # Fagerland et al. (2014), Statistics in Medicine 33, 2850-2875
    ],
)
def test_the_paired_difference_agrees_with_published_values(table: tuple[int, ...], low: float, high: float) -> None:
    first, second = outcomes(*table)
    found = paired_difference(first, second)
    assert found == pytest.approx((low, high, (table[1] - table[2]) / sum(table)), abs=5e-4)


@given(tables)
def test_the_paired_difference_is_antisymmetric_and_within_bounds(table: tuple[int, ...]) -> None:
    first, second = outcomes(*table)
    low, high, value = paired_difference(first, second)
    assert -1.0 <= low <= value <= high <= 1.0
    assert value == pytest.approx(first.mean() - second.mean(), abs=1e-12)
    assert paired_difference(second, first) == pytest.approx((-high, -low, -value), abs=1e-12)


@given(tables)
def test_the_paired_difference_shrinks_with_n(table: tuple[int, ...]) -> None:
    few = paired_difference(*outcomes(*table))
    many = paired_difference(*outcomes(*(4 * count for count in table)))
    assert many.high - many.low < few.high - few.low


def test_pairing_finds_a_difference_that_two_separate_intervals_miss() -> None:
    on, off = outcomes(both=80, only_first=8, only_second=0, neither=12)
    assert wilson(int(off.sum()), 100).high > wilson(int(on.sum()), 100).low
    assert paired_difference(on, off).low > 0


def test_a_paired_difference_needs_pairs() -> None:
    with pytest.raises(ValueError, match="same examples twice, got 2 and 1"):
        paired_difference([True, False], [True])
    with pytest.raises(ValueError, match="got 0 and 0"):
        paired_difference([], [])
