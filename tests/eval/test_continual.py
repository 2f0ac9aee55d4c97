"""The measures of continual learning: by hand, and what holds for any matrix."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex_core.eval.continual import AccuracyMatrix, over_seeds

BY_HAND = AccuracyMatrix.of(
    [0.0, 0.1, 0.2],
    [
        [0.9, 0.2, 0.2],
        [1.0, 0.8, 0.4],
        [0.5, 0.6, 0.7],
    ],
)


def test_a_matrix_by_hand() -> None:
    assert BY_HAND.num_tasks == 3
    assert BY_HAND.acc == pytest.approx((0.5 + 0.6 + 0.7) / 3)
    assert BY_HAND.learned == pytest.approx((0.9 + 0.8 + 0.7) / 3)
    assert BY_HAND.bwt == pytest.approx(((0.5 - 0.9) + (0.6 - 0.8)) / 2)
    assert BY_HAND.fwt == pytest.approx(((0.2 - 0.1) + (0.4 - 0.2)) / 2)
    assert BY_HAND.forgetting == pytest.approx(((1.0 - 0.5) + (0.8 - 0.6)) / 2), "the best of task 0 came after task 1"


def test_forgetting_counts_from_the_best_before_the_last_task() -> None:
    better_in_the_end = AccuracyMatrix.of([0, 0], [[0.5, 0.0], [0.9, 1.0]])
    assert better_in_the_end.forgetting == pytest.approx(-0.4) == -better_in_the_end.bwt


shares = st.floats(0, 1, allow_subnormal=False)


@st.composite
def matrices(draw: st.DrawFn, least: int = 2) -> AccuracyMatrix:
    """Any accuracies of 2 to 6 tasks."""
    count = draw(st.integers(least, 6))
    rows = st.lists(shares, min_size=count, max_size=count)
    return AccuracyMatrix.of(draw(rows), draw(st.lists(rows, min_size=count, max_size=count)))


@given(matrices())
def test_laws_of_any_matrix(matrix: AccuracyMatrix) -> None:
    assert matrix.forgetting >= -matrix.bwt - 1e-12
    assert 0 <= matrix.acc <= 1 and all(-1 <= x <= 1 for x in (matrix.bwt, matrix.fwt, matrix.forgetting))
    count = matrix.num_tasks
    assert matrix.acc == pytest.approx(matrix.learned + (count - 1) * matrix.bwt / count)


@given(matrices())
def test_who_never_forgets_has_forgotten_nothing(matrix: AccuracyMatrix) -> None:
    kept = AccuracyMatrix.of(matrix.before, np.tile(matrix.after[0], (matrix.num_tasks, 1)))
    assert kept.forgetting == 0 and kept.bwt == 0
    growing = AccuracyMatrix.of(matrix.before, np.maximum.accumulate(matrix.after, axis=0))
    assert growing.forgetting <= 0 <= growing.bwt


@given(matrices())
def test_what_tasks_never_say_about_each_other_is_no_transfer(matrix: AccuracyMatrix) -> None:
    own = np.tril(matrix.after) + np.triu(np.tile(matrix.before, (matrix.num_tasks, 1)), k=1)
    assert AccuracyMatrix.of(matrix.before, own).fwt == 0


def test_one_task_has_nothing_before_or_after() -> None:
    alone = AccuracyMatrix.of([0.1], [[0.9]])
    assert alone.acc == 0.9 == alone.learned
    assert math.isnan(alone.bwt) and math.isnan(alone.fwt) and math.isnan(alone.forgetting)
    with pytest.raises(ValueError, match="finite"):
        over_seeds([alone])


def test_seeds_are_independent_repeats() -> None:
    shifted = [AccuracyMatrix.of(BY_HAND.before, BY_HAND.after - change) for change in (0.0, 0.1, 0.2)]
    found = over_seeds(shifted)
    assert found.acc.value == pytest.approx(0.5) and found.fwt.value == pytest.approx(0.05)
    half = 4.302653 * 0.1 / math.sqrt(3)  # Student's t, two degrees of freedom
    assert (found.acc.low, found.acc.high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-5)
    assert found.forgetting.high - found.forgetting.low == pytest.approx(0, abs=1e-9)
    assert over_seeds([BY_HAND]).acc == pytest.approx((0.0, 1.0, BY_HAND.acc)), "one seed says nothing about spread"


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ([0.1, 0.2], [[0.1, 0.2]], r"before \[2\], after \[1, 2\]"),
        ([], [], "T ≥ 1"),
        ([0.1], [[1.1]], r"after: an accuracy of 1\.1"),
        ([float("nan")], [[1.0]], "before: an accuracy of nan"),
    ],
)
def test_other_shapes_and_numbers_are_refused(before: list[float], after: list[list[float]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AccuracyMatrix.of(before, after)
