"""What is projected, and from what: the same everywhere, different for every parameter, run and turn."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cortex_core.optim.projection import draw, is_projected, projection_seed, wide

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("shape", "rank", "expected"),
    [
        ((5, 9), 4, True), ((9, 5), 4, True), ((5, 9), 5, False), ((9, 5), 5, False), ((1, 9), 1, False),
        ((2, 2), 1, True), ((9,), 1, False), ((), 1, False), ((4, 5, 6), 1, False),
    ],
)  # fmt: skip
def test_matrices_longer_than_the_rank_are_projected(shape: tuple[int, ...], rank: int, expected: bool) -> None:
    assert is_projected(torch.zeros(shape), rank) is expected


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_a_matrix_is_seen_from_its_wide_side_and_stays_the_same_memory(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape)
    seen = wide(matrix)
    assert seen.shape == (min(shape), max(shape)) and seen.data_ptr() == matrix.data_ptr()
    seen[0, -1] = 7.0
    assert matrix[(0, -1) if shape[0] <= shape[1] else (-1, 0)] == 7.0


def test_seeds_hang_on_run_name_and_number_alone() -> None:
    cases = list(itertools.product((0, 1, 11), ("a", "1 a", "layers.0.weight"), (0, 1, 11)))
    seeds = [projection_seed(*case) for case in cases]
    assert len(set(seeds)) == len(cases) and all(0 <= seed < 2**63 for seed in seeds)
    assert projection_seed(3, "layers.0.weight", 2) == 75877566068649517, "a resumed run would draw something else"


@given(st.integers(1, 8), st.integers(1, 40), st.integers(0, 2**63 - 1))
def test_a_seed_draws_the_same_whatever_was_drawn_before(rank: int, size: int, seed: int) -> None:
    first = draw(rank, size, seed, CPU)
    torch.manual_seed(seed)
    state = torch.get_rng_state()
    assert torch.equal(draw(rank, size, seed, CPU), first) and first.shape == (rank, size)
    assert torch.equal(torch.get_rng_state(), state), "it took from the stream that the data may come from"


@pytest.mark.parametrize("rank", [1, 4, 64])
def test_lengths_are_kept_on_average(rank: int) -> None:
    vector = torch.randn(300, generator=torch.Generator().manual_seed(99_999))
    squares = torch.stack([(draw(rank, 300, seed, CPU) @ vector).square().sum() for seed in range(2000)])
    error = squares.std() / len(squares) ** 0.5
    assert (squares.mean() - vector.square().sum()).abs() < 4 * error < 0.2 * vector.square().sum()
