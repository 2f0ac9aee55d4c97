"""Figures about a judge, by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex_core.dreaming.quality import Share, contamination, measure
from cortex_core.errors import ConfigError
from tests.dreaming.scenes import verdict

CELLS = st.lists(st.tuples(st.booleans(), st.booleans()), max_size=30)


def of(cells: list[tuple[bool, bool]]) -> tuple:
    return [verdict(passed) for passed, _ in cells], [good for _, good in cells]


def test_a_weak_judge_lets_a_fifth_of_bad_dreams_in() -> None:
    """f = 5 %, p = 20 %, m = 10 %: 0.05 * 0.8 / (0.05 * 0.8 + 0.9 * 0.2) = 2 / 11."""
    assert contamination(0.05, 0.2, 0.1) == pytest.approx(2 / 11)
    cells = [(True, True)] * 180 + [(False, True)] * 20 + [(True, False)] * 40 + [(False, False)] * 760
    found = measure(*of(cells))
    shares = {name: (share.value, share.n) for name, share in found._asdict().items()}
    assert shares == {
        "precision": (pytest.approx(9 / 11), 220), "kept": (0.22, 1000), "false_pass": (0.05, 800), "miss": (0.1, 200),
        "good": (0.2, 1000),
    }  # fmt: skip
    assert found.contamination == pytest.approx(2 / 11)
    assert found.false_pass.low == pytest.approx(0.0369, abs=1e-4)  # Wilson, 40 of 800
    assert found.false_pass.high == pytest.approx(0.0674, abs=1e-4)


@given(CELLS)
def test_contamination_is_what_precision_lacks(cells: list[tuple[bool, bool]]) -> None:
    found = measure(*of(cells))
    if found.precision.value is None:
        assert found.contamination is None
    else:
        assert found.contamination == pytest.approx(1 - found.precision.value)
    for share in found:
        assert 0 <= share.low <= (share.low if share.value is None else share.value) <= share.high <= 1


def test_of_nothing_nothing_is_known() -> None:
    found = measure([], [])
    assert found.good == Share(None, 0, 0.0, 1.0) and found.contamination is None


def test_a_row_names_every_figure() -> None:
    row = measure(*of([(True, True), (False, False)])).row()
    assert row["yield_value"] == 0.5 and row["precision_n"] == 1 and row["contamination"] == 0.0
    assert len(row) == 5 * 4 + 1


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match="1 verdicts and 2 labels"):
        measure([verdict(True)], [True, False])
    with pytest.raises(ConfigError, match=r"miss = 1.5 must be a share"):
        contamination(0.1, 0.1, 1.5)
