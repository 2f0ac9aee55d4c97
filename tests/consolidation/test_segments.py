"""Segments against a loop over tokens: the same borders for any split, any batch, any padding."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from cortex_core.config import SegmentsConfig
from cortex_core.consolidation.segments import NONE, Marks, SegmentState, detect
from cortex_core.errors import DataError

CONFIG = SegmentsConfig(average_decay=0.9, warmup_tokens=3, min_tokens=2, max_tokens=6)
# Few different values, so that ties with the thresholds and runs of both kinds are common; and any others.
VALUES = st.one_of(st.sampled_from([0.0, 1.0, 1.05, 1.2, 2.0, 5.0]), st.floats(0, 1e6))
STREAM = st.lists(VALUES, max_size=40)


def oracle(values: list[float], config: SegmentsConfig) -> tuple[list[tuple[int, int]], int | None]:
    """Token by token, as the definition reads: [first, stop) of the segments that end, and where the open one began."""
    total = weight = 0.0
    first, segments = None, []
    for t, value in enumerate(values):
        above = value * weight > config.open_ratio * total
        below = value * weight < config.close_ratio * total
        if first is not None:
            age = t - first
            if age == config.max_tokens or (below and age >= config.min_tokens):
                segments.append((first, t))
                first = None
        if first is None and above and t >= config.warmup_tokens:
            first = t
        total = total * config.average_decay + (1.0 - config.average_decay) * value
        weight = weight * config.average_decay + (1.0 - config.average_decay)
    return segments, first


def borders(marks: Marks, row: int = 0) -> list[tuple[int, int]]:
    opened, closed = (where[row].nonzero()[:, 0].tolist() for where in (marks.opened, marks.closed))
    return list(zip(opened, closed, strict=False))


def joined(parts: list[Marks]) -> Marks:
    return Marks(*(torch.cat(pieces, dim=1) for pieces in zip(*parts, strict=True)))


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def rows(*streams: list[float]) -> Tensor:
    return torch.tensor(streams, dtype=torch.float64).view(len(streams), -1)


@given(STREAM)
def test_a_loop_over_tokens_finds_the_same(values: list[float]) -> None:
    segments, first = oracle(values, CONFIG)
    marks, state = detect(rows(values), SegmentState.zeros(1), CONFIG)
    assert borders(marks) == segments
    assert int(state.first) == (NONE if first is None else first)
    inside = [any(a <= t < b for a, b in segments) or (first is not None and t >= first) for t in range(len(values))]
    assert marks.inside[0].tolist() == inside
    assert int(state.num_tokens) == len(values)


@given(STREAM, st.lists(st.integers(0, 40), max_size=6))
def test_any_split_over_calls_gives_the_same_bit_for_bit(values: list[float], cuts: list[int]) -> None:
    whole, end = detect(rows(values), SegmentState.zeros(1), CONFIG)
    state, parts = SegmentState.zeros(1), []
    places = [0, *sorted(min(cut, len(values)) for cut in cuts), len(values)]
    for start, stop in itertools.pairwise(places):
        marks, state = detect(rows(values)[:, start:stop], state, CONFIG)
        parts.append(marks)
    assert same(joined(parts), whole)
    assert same(state, end)


@given(st.lists(STREAM, min_size=1, max_size=9))
def test_rows_are_independent_of_each_other_and_of_padding(streams: list[list[float]]) -> None:
    width = max(len(stream) for stream in streams)
    padded = rows(*(stream + [math.nan] * (width - len(stream)) for stream in streams))
    valid = torch.arange(width) < torch.tensor([len(stream) for stream in streams])[:, None]
    marks, state = detect(padded, SegmentState.zeros(len(streams)), CONFIG, valid=valid)
    for row, stream in enumerate(streams):
        alone, end = detect(rows(stream), SegmentState.zeros(1), CONFIG)
        assert same(tuple(part[row : row + 1, : len(stream)] for part in marks), alone)
        assert not any(bool(part[row, len(stream) :].any()) for part in marks)
        assert same(tuple(part[row : row + 1] for part in state), end)


@given(STREAM, st.integers(1, 8), st.integers(0, 8))
def test_lengths_are_bounded(values: list[float], shortest: int, more: int) -> None:
    config = CONFIG.model_copy(update={"min_tokens": shortest, "max_tokens": shortest + more})
    marks, _ = detect(rows(values), SegmentState.zeros(1), config)
    found = borders(marks)
    assert all(shortest <= stop - first <= shortest + more for first, stop in found)
    assert all(stop <= first for (_, stop), (first, _) in itertools.pairwise(found))


@given(st.lists(st.sampled_from([0.5, 1.0, 1.5, 3.0, 8.0]), max_size=40), st.sampled_from([2.0**-20, 2.0, 2.0**30]))
def test_only_ratios_count(values: list[float], unit: float) -> None:
    """Nats or bits, loss or the memory's error: powers of two, so that not even rounding differs."""
    marks, _ = detect(rows(values), SegmentState.zeros(1), CONFIG)
    scaled, _ = detect(rows(values) * unit, SegmentState.zeros(1), CONFIG)
    assert same(marks, scaled)


def test_the_average_is_that_of_the_tokens_before() -> None:
    """A first loud token is compared with silence, not with itself; after few tokens it is their plain weighted mean."""
    config = SegmentsConfig(average_decay=0.5, warmup_tokens=1, min_tokens=1)
    marks, state = detect(rows([1.0, 1.3, 1.0]), SegmentState.zeros(1), config)
    assert borders(marks) == [(1, 2)]
    assert float(state.total / state.weight) == pytest.approx((1.0 * 4 + 1.3 * 2 + 1.0) / 7)


def test_nothing_opens_while_the_average_warms_up() -> None:
    loud = [1.0, 9.0, 1.0, 9.0, 1.0, 9.0, 9.0, 1.0]
    config = SegmentsConfig(average_decay=0.9, warmup_tokens=5, min_tokens=1)
    assert borders(detect(rows(loud), SegmentState.zeros(1), config)[0]) == [(5, 7)]
    later = config.model_copy(update={"warmup_tokens": 8})
    assert not bool(detect(rows(loud), SegmentState.zeros(1), later)[0].inside.any())


def test_both_thresholds_are_ratios_so_normal_is_reached() -> None:
    """In the source, `loss - EMA < 1.05 EMA` closes at 2.05 times the average: normal reading is 'surprising' up to there,
    and 1.3 to 2.2 times never opens."""
    normal, raised = [1.0] * 40, [1.5] * 6
    marks, state = detect(rows(normal + raised + normal), SegmentState.zeros(1), SegmentsConfig())
    assert borders(marks) == [(40, 46)]
    assert int(state.first) == NONE


def test_between_the_thresholds_a_segment_stays_what_it_is() -> None:
    config = SegmentsConfig(average_decay=0.999, warmup_tokens=4, min_tokens=1)
    quiet = [1.0] * 40
    marks, _ = detect(rows([*quiet, 1.12, 1.12, 1.4, 1.12, 1.12, 1.0, 1.12]), SegmentState.zeros(1), config)
    assert borders(marks) == [(42, 45)]


def test_what_goes_on_beyond_the_longest_opens_the_next() -> None:
    config = SegmentsConfig(average_decay=0.999, warmup_tokens=4, max_tokens=10)
    marks, state = detect(rows([1.0] * 20 + [5.0] * 25), SegmentState.zeros(1), config)
    assert borders(marks) == [(20, 30), (30, 40)]
    assert marks.opened[0].sum() == 3 and int(state.first) == 40
    assert int(state.cut().first) == NONE and same(state.cut()[:3], state[:3])


def test_a_silent_stream_is_no_division_by_zero() -> None:
    marks, _ = detect(rows([0.0] * 50), SegmentState.zeros(1), SegmentsConfig())
    assert not bool(marks.inside.any())


@pytest.mark.parametrize("wrong", [-1e-9, math.nan, math.inf])
def test_a_wrong_surprise_is_refused_before_it_spoils_the_average(wrong: float) -> None:
    with pytest.raises(DataError, match=r"surprise = .*: must be finite and at least 0"):
        detect(rows([1.0, wrong]), SegmentState.zeros(1), CONFIG)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"close_ratio": 1.2}, "close_ratio = 1.2 must be below open_ratio = 1.2"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens = 9 must be at most max_tokens = 8"),
        ({"open_ratio": 1.0, "close_ratio": 0.5}, "greater than 1"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SegmentsConfig(**settings)  # type: ignore[arg-type]


def test_halves_and_gradients_are_taken_as_they_are() -> None:
    surprise = torch.rand(2, 50, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    marks, state = detect(surprise, SegmentState.zeros(2), CONFIG)
    again, _ = detect(surprise.detach().double(), SegmentState.zeros(2), CONFIG)
    assert same(marks, again) and not state.total.requires_grad
