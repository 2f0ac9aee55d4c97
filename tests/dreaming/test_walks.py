"""Links between memories against their definition, and walks over them against the exact law."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex_core.config import MemoryGraphConfig
from cortex_core.dreaming.links import Links, links
from cortex_core.dreaming.walks import Steps, visit_law, walks

CONFIG = MemoryGraphConfig(neighbours=3, time_tokens=20.0)


def placed(size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    positions = rng.choice(1000, size, replace=False)
    return rng.normal(size=(size, 5)).astype(np.float32), positions, positions // 100


def by_pair(found: Links) -> dict[tuple[int, int], tuple[float, ...]]:
    pairs = map(tuple, found.ends.tolist())
    return dict(zip(pairs, zip(*(part.tolist() for part in found[1:]), strict=True), strict=True))


@given(size=st.integers(0, 40), seed=st.integers(0, 50))
def test_links_are_what_each_memory_proposes(size: int, seed: int) -> None:
    """Memory by memory, in plain loops."""
    addresses, positions, segments = placed(size, seed)
    unit = addresses / np.linalg.norm(addresses, axis=1, keepdims=True)
    expected = set()
    in_time = np.argsort(positions)
    rank = {int(place): at for at, place in enumerate(in_time)}
    for one in range(size):
        others = sorted((o for o in range(size) if o != one), key=lambda o: -float(unit[one] @ unit[o]))
        expected |= {tuple(sorted((one, o))) for o in others[:3]}
        after = [int(place) for place in in_time[rank[one] + 1 :]]
        expected |= {tuple(sorted((one, o))) for o in after[:2]}
        expected |= {tuple(sorted((one, o))) for o in [o for o in after if segments[o] == segments[one]][:3]}
    found = by_pair(links(addresses, positions, segments, CONFIG))
    assert set(found) <= expected
    for pair in expected:
        one, other = pair
        cosine = max(0.0, float(unit[one] @ unit[other]))
        near = 0.5 * float(np.exp(-abs(int(positions[one]) - int(positions[other])) / 20.0))
        together = 0.25 if segments[one] == segments[other] else 0.0
        assert found.get(pair, (0, 0, 0)) == pytest.approx((cosine, near, together), abs=1e-6)


def test_links_do_not_grow_with_the_square() -> None:
    addresses, positions, segments = placed(900)
    assert len(links(addresses, positions, 0 * segments, CONFIG).ends) <= 900 * (3 + 2 + 3)


def test_a_kind_without_weight_proposes_nothing() -> None:
    addresses, positions, segments = placed(30)
    alone = MemoryGraphConfig(similarity_weight=0.0, time_weight=0.0, neighbours=3)
    found = links(addresses, positions, segments, alone)
    assert len(found.ends) and (segments[found.ends[:, 0]] == segments[found.ends[:, 1]]).all()
    assert set(found.weight) == {0.25}


def test_an_address_of_zeros_is_like_none() -> None:
    addresses, positions, segments = placed(6)
    found = links(0 * addresses, positions, segments, CONFIG)
    assert not found.similarity.any()


# --- walks -----------------------------------------------------------------------------------------------------------


def random_steps(size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Links of a connected graph, but for its last place."""
    rng = np.random.default_rng(seed)
    chain = [(at, at + 1) for at in range(size - 2)]
    more = {tuple(sorted(rng.choice(size - 1, 2, replace=False).tolist())) for _ in range(size)}
    ends = np.array(sorted({*chain, *more}))
    return ends, rng.uniform(0.1, 2.0, len(ends))


@pytest.mark.parametrize("restart", [0.15, 0.5])
def test_an_endless_walk_visits_by_the_exact_law(restart: float) -> None:
    """Last places of 40,000 walks, whose law is 0.85^60 away from it at most."""
    ends, weights = random_steps(9)
    law = visit_law(ends, weights, 9, 2, restart)
    assert law.sum() == pytest.approx(1.0) and law[8] == 0 and (law >= 0).all()
    draws = np.random.default_rng(1).random((40_000, 60, 2))
    last = walks(Steps.along(ends, weights, 9), np.full(40_000, 2), draws, restart)[:, -1]
    found = np.bincount(last, minlength=9) / 40_000
    assert np.abs(found - law).max() < 4 * np.sqrt(0.25 / 40_000)


def test_the_exact_law_is_that_of_the_next_step() -> None:
    """r = c e + (1 - c) Wᵀ r."""
    ends, weights = random_steps(12, seed=3)
    chances = np.zeros((12, 12))
    for (one, other), weight in zip(ends, weights, strict=True):
        chances[one, other] = chances[other, one] = weight
    chances[11, 11] = 1.0
    chances /= chances.sum(1, keepdims=True)
    law = visit_law(ends, weights, 12, 4, 0.2)
    assert law == pytest.approx(0.2 * np.eye(12)[4] + 0.8 * chances.T @ law)


def test_steps_follow_the_weights() -> None:
    ends, weights = np.array([[0, 1], [0, 2], [1, 2]]), np.array([1.0, 3.0, 1.0])
    steps = Steps.along(ends, weights, 3)
    draws = (np.arange(1000) + 0.5) / 1000
    reached = np.bincount(steps.taken(np.zeros(1000, dtype=np.int64), draws), minlength=3)
    assert reached.tolist() == [0, 250, 750]


def test_who_has_no_link_stays() -> None:
    steps = Steps.along(np.zeros((0, 2), dtype=np.int64), np.zeros(0), 3)
    assert walks(steps, np.array([0, 2]), np.random.default_rng(0).random((2, 5, 2)), 0.1).tolist() == [
        [0] * 6,
        [2] * 6,
    ]


@given(size=st.integers(2, 30), seed=st.integers(0, 30), draw=st.floats(0.0, 1.0, exclude_max=True))
def test_every_draw_leads_to_a_neighbour(size: int, seed: int, draw: float) -> None:
    """Also the largest below 1, which rounds up when a place is added to it."""
    ends, weights = random_steps(size + 1, seed)
    steps = Steps.along(ends, weights, size + 1)
    neighbours = {(a, b) for a, b in ends.tolist()} | {(b, a) for a, b in ends.tolist()} | {(size, size)}
    places = np.arange(size + 1)
    for value in (draw, float(np.nextafter(1.0, 0.0))):
        reached = steps.taken(places, np.full(size + 1, value))
        assert {(int(a), int(b)) for a, b in zip(places, reached, strict=True)} <= neighbours
