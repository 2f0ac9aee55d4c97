"""Mean and variance in parts: as of the whole, in any order, also where the variance is small beside the mean."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from cortex_core.consolidation.moments import Moments


def vectors(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed)) * 3 + 1


@given(st.lists(st.integers(0, 9), max_size=6))
def test_parts_have_the_moments_of_the_whole(lengths: list[int]) -> None:
    data = vectors(sum(lengths))
    moments = Moments.zeros(5)
    for part in data.split(lengths):
        moments = moments.merge(Moments.of(part))
    assert int(moments.num_vectors) == len(data)
    if len(data):
        assert torch.allclose(moments.mean, data.mean(0), atol=1e-5)
        assert torch.allclose(moments.variance, data.var(0, correction=0), atol=1e-4)
    else:
        assert not bool(moments.variance.any())


@given(st.integers(1, 20), st.integers(1, 20))
def test_the_order_of_parts_does_not_matter(first: int, second: int) -> None:
    a, b = Moments.of(vectors(first)), Moments.of(vectors(second, seed=1))
    for one, other in zip(a.merge(b), b.merge(a), strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    nothing = Moments.zeros(5)
    for one, other in zip(a.merge(nothing), a, strict=True):
        assert torch.allclose(one, other)
    for one, other in zip(nothing.merge(a), a, strict=True):
        assert torch.allclose(one, other)


def test_the_source_takes_the_second_moment_and_a_sum_of_squares_loses_the_variance() -> None:
    data = 4096.0 + vectors(64) / 3
    true = data.double().var(0, correction=0)
    halves = Moments.of(data[:20]).merge(Moments.of(data[20:]))
    second_moment = data.square().mean(0)
    assert torch.allclose(halves.variance.double(), true, rtol=1e-2)
    assert float((second_moment / true).min()) > 1e6
    by_sums = second_moment - data.mean(0).square()
    assert float((by_sums.double() / true - 1).abs().max()) > 0.5


def test_some_of_them_and_half_precision() -> None:
    data, where = vectors(12), torch.arange(12) % 3 == 0
    found = Moments.of(data.bfloat16(), where)
    assert int(found.num_vectors) == 4 and found.mean.dtype == torch.float32
    assert torch.allclose(found.mean, data[where].bfloat16().float().mean(0))
    assert int(Moments.of(data, where & False).num_vectors) == 0
