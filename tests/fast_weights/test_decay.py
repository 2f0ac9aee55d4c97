"""Decay by head: time scales, half-lives that are learned, and the bound that learning cannot cross."""

from __future__ import annotations

import math

import pytest
import torch

from cortex_core.config import FastWeightsConfig
from cortex_core.fast_weights.decay import Decay


def test_heads_take_the_time_scales_in_turn() -> None:
    half_life = math.log(0.5) / math.log(0.9)
    decay = Decay(FastWeightsConfig(decay=0.9, time_scales=(0.1, 1.0, 10.0)), heads=4)
    expected = torch.tensor([0.1, 1.0, 10.0, 0.1]) * half_life
    assert torch.allclose(decay.half_lives(), expected)
    assert not [*decay.parameters()] and not decay.state_dict()


def test_no_decay_is_an_infinite_half_life() -> None:
    decay = Decay(FastWeightsConfig(decay=1.0), heads=2)
    assert torch.equal(decay(), torch.zeros(2)) and decay.half_lives().isinf().all()


@pytest.mark.parametrize("config", [
    FastWeightsConfig(decay=0.98, learn_decay=True),
    FastWeightsConfig(rule="hebbian", decay=0.98, write_strength=0.02, learn_decay=True),
])  # fmt: skip
def test_a_learned_half_life_starts_from_the_given_one_and_can_move(config: FastWeightsConfig) -> None:
    decay = Decay(config, heads=3)
    assert torch.allclose(decay(), torch.full((3,), math.log(0.98)), atol=1e-6)
    (gradient,) = torch.autograd.grad(decay().sum(), [*decay.parameters()])
    assert (gradient != 0).all()


def test_learning_cannot_leave_the_stable_range() -> None:
    config = FastWeightsConfig(rule="hebbian", decay=0.9, write_strength=0.05, anti_hebbian_rate=0.01, learn_decay=True)
    decay = Decay(config, heads=1)
    assert decay.log_rate is not None
    torch.nn.init.constant_(decay.log_rate, -50.0)  # as slow as it gets
    assert float(decay().detach()) == pytest.approx(-0.04, abs=1e-6)
