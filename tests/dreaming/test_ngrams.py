"""N-gram sets against sets of n-grams."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex_core.dreaming.ngrams import NgramSet, ngrams
from cortex_core.errors import ConfigError

TOKENS = st.lists(st.integers(0, 5), max_size=12)


def plain(tokens: list[int], count: int) -> set[tuple[int, ...]]:
    width = min(count, len(tokens))
    return {tuple(tokens[at : at + width]) for at in range(len(tokens) - width + 1)} if tokens else set()


@given(TOKENS, st.integers(1, 5))
def test_there_is_a_hash_for_every_ngram(tokens: list[int], count: int) -> None:
    assert len(ngrams(tokens, count)) == len(plain(tokens, count))


@given(TOKENS, TOKENS, st.integers(1, 4))
def test_hashes_are_equal_where_ngrams_are(one: list[int], other: list[int], count: int) -> None:
    shared = np.intersect1d(ngrams(one, count), ngrams(other, count))
    assert len(shared) == len(plain(one, count) & plain(other, count))


def test_order_and_length_matter() -> None:
    assert len({int(ngrams(tokens, 4)[0]) for tokens in ([1, 2], [2, 1], [1, 2, 0], [0, 1, 2], [3])}) == 5


@given(st.lists(TOKENS, max_size=5), TOKENS)
def test_novelty_is_the_share_that_is_new(rows: list[list[int]], tokens: list[int]) -> None:
    known = set().union(*(plain(row, 3) for row in rows))
    asked = plain(tokens, 3)
    expected = len(asked - known) / len(asked) if asked else 1.0
    assert NgramSet.empty(3, 20).with_rows(rows).novelty(tokens) == pytest.approx(expected, abs=2e-3)


def test_a_set_is_bounded_and_accounts_for_what_passes_by_chance() -> None:
    rng = np.random.default_rng(0)
    full = NgramSet.empty(2, 12).with_rows([rng.integers(0, 1000, 3000)])
    assert full.bits.nbytes == 512 and 0.4 < full.fill < 0.6
    new = [full.novelty(rng.integers(1000, 2000, 200).tolist()) for _ in range(50)]
    assert np.mean(new) == pytest.approx(1.0, abs=0.05)


def test_a_set_is_a_value() -> None:
    empty = NgramSet.empty(2, 10)
    more = empty.with_rows([[1, 2, 3]])
    assert empty.novelty([1, 2]) == 1.0 and more.novelty([1, 2]) == 0.0 and empty.fill == 0.0


def test_sets_of_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1 token"):
        NgramSet.empty(0, 10)
