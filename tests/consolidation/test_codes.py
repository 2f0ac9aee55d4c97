"""Codes: what is recoverable comes out again on segments that were held out, what is not does not, and it is said."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cortex_core.config import CodesConfig
from cortex_core.consolidation.codes import SegmentCoder, StatisticsShape, fit
from cortex_core.consolidation.statistics import LEAST_VARIANCE, Recoverable, Statistics, low_rank_share
from cortex_core.errors import ConfigError, DataError, IncompatibleError
from tests.consolidation.scenes import DIM, HEADS, HIDDEN, LAYERS, RANK, few_causes

SMALL = CodesConfig(code_size=16, hidden_size=64, num_directions=1, steps=300, batch_size=32, learning_rate=3e-3)


def deltas(seed: int, count: int = 3) -> torch.Tensor:
    return torch.randn(count, 2, HEADS, RANK, DIM, generator=torch.Generator().manual_seed(seed))


def recoverable(delta_up: torch.Tensor, directions: int) -> Recoverable:
    flat = torch.zeros(len(delta_up), 2, HIDDEN)
    return Recoverable.of(Statistics(flat, flat, delta_up), directions)


@given(st.integers(0, 50), st.integers(1, RANK))
def test_the_low_rank_part_is_the_nearest_of_its_rank(seed: int, directions: int) -> None:
    delta = deltas(seed)
    found = recoverable(delta, directions)
    lost = torch.linalg.svdvals(delta)[..., directions:].square().sum((-2, -1))
    assert torch.allclose((delta - found.delta_up).square().sum((-3, -2, -1)), lost, atol=1e-4)
    assert int(torch.linalg.matrix_rank(found.delta_up).max()) == directions
    share = 1 - float(lost.sum() / delta.square().sum())
    assert low_rank_share(delta, directions) == pytest.approx(share, abs=1e-5)


@given(st.integers(0, 50), st.integers(1, RANK))
def test_factors_do_not_depend_on_the_sign_of_a_direction(seed: int, directions: int) -> None:
    """A change and its opposite have the same `right`: LAPACK's own choice of sign, which may differ, is not left in."""
    one, other = recoverable(deltas(seed), directions), recoverable(-deltas(seed), directions)
    assert torch.allclose(one.right, other.right, atol=1e-4)
    assert torch.allclose(one.left, -other.left, atol=1e-4)
    assert bool((one.right.max(-1).values >= -one.right.min(-1).values).all())


def test_segments_side_by_side() -> None:
    segments = few_causes(4)
    found = Statistics.of(segments)
    assert found.mean.shape == (4, len(LAYERS), HIDDEN)
    assert StatisticsShape.of(found) == (len(LAYERS), HIDDEN, HEADS, RANK, DIM)
    last = segments[2].stats[LAYERS[1]]
    assert torch.equal(found.mean[2, 1], last.mean) and torch.equal(found.delta_up[2, 1], last.delta_up)
    assert torch.allclose(found.log_variance[2, 1].exp(), last.variance)


def test_a_segment_of_one_token_has_a_finite_log_variance() -> None:
    segment = few_causes(1)[0]
    segment.stats[LAYERS[0]].variance.zero_()
    assert torch.allclose(Statistics.of([segment]).log_variance[0, 0].exp(), torch.tensor(LEAST_VARIANCE))


def trained(statistics: Statistics, config: CodesConfig = SMALL) -> tuple[SegmentCoder, dict[str, float]]:
    torch.manual_seed(0)
    coder = SegmentCoder(StatisticsShape.of(statistics), config)
    given = Recoverable.of(statistics, config.num_directions)
    coder.observe(given)
    return coder, fit(coder, given, generator=torch.Generator().manual_seed(0))


def test_what_has_few_causes_is_explained_on_held_out_segments() -> None:
    coder, errors = trained(Statistics.of(few_causes(300)))
    held_out = Statistics.of(few_causes(60, seed=1))
    found = coder.explained_variance(held_out)
    assert found["codes/low_rank_share"] > 0.95
    for part in ("mean", "log_variance", "delta_up", "whole_delta_up"):
        assert found[f"codes/{part}_explained"] > 0.8, found
    assert set(errors) == {f"codes/{part}_error" for part in ("mean", "log_variance", "delta_up")}
    assert all(error < 0.2 for error in errors.values())
    assert coder.encode(Recoverable.of(held_out, 1)).shape == (60, 16)


def test_what_has_no_causes_is_not() -> None:
    """Changes that are noise: nothing of a held-out one is in any code, and the report says so."""
    statistics = Statistics.of(few_causes(364))
    noise = deltas(7, 364)
    coder, _ = trained(Statistics(statistics.mean[:300], statistics.log_variance[:300], noise[:300]))
    found = coder.explained_variance(Statistics(statistics.mean[300:], statistics.log_variance[300:], noise[300:]))
    assert found["codes/mean_explained"] > 0.8
    assert found["codes/whole_delta_up_explained"] < 0.3
    assert found["codes/low_rank_share"] < 0.95


def begun(statistics: Statistics, config: CodesConfig) -> SegmentCoder:
    torch.manual_seed(0)
    coder = SegmentCoder(StatisticsShape.of(statistics), config)
    given = Recoverable.of(statistics, config.num_directions)
    coder.observe(given)
    coder.begin(given)
    return coder


def test_it_begins_with_the_best_linear_code() -> None:
    """With as many numbers as there are causes of the means, these are explained; the codes are white."""
    statistics = Statistics.of(few_causes(200))
    given = Recoverable.of(statistics, 1)
    small, whole = (begun(statistics, SMALL.model_copy(update={"code_size": size})) for size in (3, 60))
    codes = small.encode(given)
    assert torch.allclose(codes.mean(0), torch.zeros(3), atol=1e-4)
    assert torch.allclose(codes.var(0, correction=0), torch.ones(3), rtol=1e-3)
    assert small.explained_variance(statistics)["codes/mean_explained"] > 0.9
    # More numbers than features: everything comes out, but for what has next to no variance.
    for part, other in zip(whole.decode(whole.encode(given)), given, strict=True):
        assert torch.allclose(part, other, atol=1e-2)
    kept = trained(statistics)[0]
    linear = begun(statistics, SMALL).errors(given)
    assert sum(kept.errors(given).values()) <= sum(linear.values())


def test_a_fit_that_goes_wrong_ends_where_it_was_best() -> None:
    statistics = Statistics.of(few_causes(100))
    given = Recoverable.of(statistics, 1)
    wild, told = trained(statistics, SMALL.model_copy(update={"learning_rate": 3.0, "steps": 60}))
    linear = begun(statistics, SMALL)
    errors = [float(sum(coder.errors(given).values()).detach()) for coder in (wild, linear)]
    assert errors[0] < 1.5 * errors[1] and sum(told.values()) < 0.2  # ten segments judge it


def test_a_second_fit_goes_on_from_the_first() -> None:
    statistics = Statistics.of(few_causes(100))
    coder, _ = trained(statistics, SMALL.model_copy(update={"steps": 1, "learning_rate": 1e-9}))
    before = coder.encode(Recoverable.of(statistics, 1)).detach()
    coder.observe(new := Recoverable.of(Statistics.of(few_causes(100, seed=4)), 1))
    fit(coder, new, generator=torch.Generator().manual_seed(1))
    after, again = coder.encode(Recoverable.of(statistics, 1)), begun(Statistics.of(few_causes(100, seed=4)), SMALL)
    assert int(coder.get_buffer("num_fits")) == 2
    assert float((after.detach() - before).square().mean()) < 0.1
    assert float((again.encode(Recoverable.of(statistics, 1)).detach() - before).square().mean()) > 0.5


def test_an_untrained_coder_explains_nothing() -> None:
    statistics = Statistics.of(few_causes(50))
    torch.manual_seed(0)
    coder = SegmentCoder(StatisticsShape.of(statistics), SMALL)
    coder.observe(Recoverable.of(statistics, 1))
    assert all(
        value < 0.2 for name, value in coder.explained_variance(statistics).items() if name.endswith("explained")
    )


def test_features_are_normalised_by_all_that_was_observed_in_any_parts() -> None:
    given = Recoverable.of(Statistics.of(few_causes(40)), 1)
    coders = [SegmentCoder(StatisticsShape.of(given), SMALL) for _ in range(2)]
    coders[0].observe(given)
    for part in torch.arange(40).split(13):
        coders[1].observe(given.at(part))
    for name, value in coders[0].named_buffers():
        assert torch.allclose(value, coders[1].get_buffer(name), atol=1e-4), name
    assert float(coders[1].get_buffer("feature_num_vectors")) == 40
    mean = coders[0].get_buffer("feature_mean")[: len(LAYERS) * HIDDEN]
    assert torch.allclose(mean, given.mean.flatten(1).mean(0), atol=1e-5)


def test_units_do_not_matter() -> None:
    """A layer whose input is a thousand times as large is coded like the others."""
    statistics = Statistics.of(few_causes(300))
    large = Statistics(statistics.mean * 1000, statistics.log_variance, statistics.delta_up * 1000)
    for one, other in zip(trained(statistics)[1].values(), trained(large)[1].values(), strict=True):
        assert other == pytest.approx(one, rel=0.2)


def test_codes_are_repeatable_and_a_saved_coder_goes_on() -> None:
    statistics = Statistics.of(few_causes(30))
    config = SMALL.model_copy(update={"steps": 5})
    (coder, errors), (_, again) = trained(statistics, config), trained(statistics, config)
    assert errors == again
    other = SegmentCoder(coder.shape, config)
    other.load_state_dict(coder.state_dict())
    given = Recoverable.of(statistics, 1)
    assert torch.equal(other.encode(given), coder.encode(given))
    assert all(
        torch.equal(a, b)
        for a, b in zip(other.decode(other.encode(given)), coder.decode(coder.encode(given)), strict=True)
    )


def test_a_constant_feature_is_no_division_by_zero() -> None:
    statistics = Statistics.of(few_causes(30))
    still = Statistics(torch.ones_like(statistics.mean), statistics.log_variance, torch.zeros_like(statistics.delta_up))
    coder, errors = trained(still, SMALL.model_copy(update={"steps": 5}))
    assert all(error < 1e3 for error in errors.values())
    found = coder.explained_variance(still)
    assert found["codes/mean_explained"] != found["codes/mean_explained"]  # nan: there is no variance to explain
    assert found["codes/low_rank_share"] == 0.0


def test_wrong_requests() -> None:
    statistics = Statistics.of(few_causes(3))
    shape, given = StatisticsShape.of(statistics), Recoverable.of(statistics, 1)
    with pytest.raises(ConfigError, match="num_directions = 4: a change of rank 3 has at most 3"):
        SegmentCoder(shape, CodesConfig(num_directions=4))
    with pytest.raises(ConfigError, match="num_directions = 4"):
        Recoverable.of(statistics, 4)
    with pytest.raises(IncompatibleError, match=r"with 2 directions: this coder is for .* with 1"):
        SegmentCoder(shape, SMALL).encode(Recoverable.of(statistics, 2))
    with pytest.raises(DataError, match="call observe first"):
        fit(SegmentCoder(shape, SMALL), given, generator=torch.Generator())
    seen = SegmentCoder(shape, SMALL)
    seen.observe(given)
    with pytest.raises(DataError, match="1 segments: a fit needs at least 2"):
        fit(seen, given.at(torch.tensor([0])), generator=torch.Generator())
    with pytest.raises(DataError, match="1 held-out segments: variance needs at least 2"):
        SegmentCoder(shape, SMALL).explained_variance(Statistics(*(part[:1] for part in statistics)))
    with pytest.raises(DataError, match="there are none"):
        Statistics.of([])
    odd = few_causes(2)
    odd[1].stats.pop(LAYERS[0])  # type: ignore[attr-defined]
    with pytest.raises(IncompatibleError, match=r"segments of memory layers \[\(1, 5\), \(5,\)\]"):
        Statistics.of(odd)
