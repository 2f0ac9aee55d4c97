"""The laws of synaptic scaling: a fixed point, no change of direction, monotone, bounded."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from cortex_core.config import ScalingConfig
from cortex_core.consolidation.scaling import scaled, unit_norms
from cortex_core.errors import ConfigError

RATE, NORM, BOUND = st.floats(0, 1), st.floats(1e-3, 1e3), st.floats(1.01, 100)


def unit(norm: float, seed: int = 0) -> Tensor:
    weights = torch.randn(1, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return weights / weights.norm() * norm


@given(RATE, NORM, NORM, BOUND)
def test_a_norm_goes_towards_its_target_and_never_beyond(rate: float, norm: float, target: float, most: float) -> None:
    config = ScalingConfig(rate=rate, target_norm=target, max_factor=most)
    after = float(unit_norms(scaled(unit(norm), config)))
    tolerance = 1e-9 * max(norm, target)
    assert min(norm, target) - tolerance <= after <= max(norm, target) + tolerance
    expected = norm * min(max((target / norm) ** rate, 1 / most), most)
    assert after == pytest.approx(expected, rel=1e-9)


@given(RATE, NORM, BOUND)
def test_the_target_is_a_fixed_point(rate: float, norm: float, most: float) -> None:
    weights = unit(norm)
    config = ScalingConfig(rate=rate, max_factor=most)
    assert torch.allclose(scaled(weights, config, unit_norms(weights)), weights, rtol=1e-12)


@given(RATE, NORM, NORM, BOUND)
def test_a_unit_never_changes_direction(rate: float, norm: float, target: float, most: float) -> None:
    weights = unit(norm)
    after = scaled(weights, ScalingConfig(rate=rate, target_norm=target, max_factor=most))
    assert torch.allclose(after / after.norm(), weights / weights.norm(), rtol=1e-12)


@given(RATE, NORM, NORM, NORM, BOUND)
def test_the_stronger_unit_stays_the_stronger(
    rate: float, one: float, other: float, target: float, most: float
) -> None:
    assume(one < other)
    config = ScalingConfig(rate=rate, target_norm=target, max_factor=most)
    a, b = (float(unit_norms(scaled(unit(norm), config))) for norm in (one, other))
    assert a <= b * (1 + 1e-9)


@pytest.mark.parametrize("norm", [1e-3, 0.3, 1.0, 40.0])
def test_again_and_again_it_arrives(norm: float) -> None:
    weights, config, apart = unit(norm), ScalingConfig(rate=0.3), []
    for _ in range(60):
        apart.append(abs(float(unit_norms(weights).log())))
        weights = scaled(weights, config)
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(apart))
    assert float(unit_norms(weights)) == pytest.approx(1.0, abs=1e-6)


def test_off_is_bit_for_bit_and_units_are_their_own() -> None:
    weights = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(scaled(weights, ScalingConfig()), weights)
    targets = torch.full((3, 4), 2.0)
    whole = scaled(weights, ScalingConfig(rate=1.0, max_factor=1e6), targets)
    assert torch.allclose(unit_norms(whole), targets)
    one = scaled(weights[1, 2:3], ScalingConfig(rate=1.0, max_factor=1e6), targets[1, 2:3])
    assert torch.equal(one[0], whole[1, 2])


def test_a_unit_without_weights_stays_without() -> None:
    weights = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    after = scaled(weights, ScalingConfig(rate=1.0, max_factor=10.0))
    assert torch.equal(after, torch.tensor([[0.0, 0.0], [0.6, 0.8]]))


@pytest.mark.parametrize("target", [0.0, -1.0, float("nan"), float("inf")])
def test_a_target_that_cannot_be_aimed_at(target: float) -> None:
    with pytest.raises(ConfigError, match="must be finite and above 0"):
        scaled(torch.ones(1, 2), ScalingConfig(rate=0.5), torch.tensor([target]))
    with pytest.raises(ValidationError):
        ScalingConfig(target_norm=target)
