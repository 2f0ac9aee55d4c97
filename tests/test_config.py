"""The core's settings: documented, closed, bounded."""

from __future__ import annotations

import inspect
from types import NoneType
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cortex_core import config
from cortex_core.config import EvaluationConfig, FastWeightsConfig, Settings, TrainingConfig

CLASSES = [
    item for _, item in inspect.getmembers(config, inspect.isclass)
    if issubclass(item, Settings) and item is not Settings
]  # fmt: skip


@pytest.mark.parametrize("settings", CLASSES)
def test_every_setting_says_what_it_does(settings: type[Settings]) -> None:
    assert settings.__doc__
    undocumented = [key for key, field in settings.model_fields.items() if not field.description]
    assert not undocumented


@pytest.mark.parametrize("settings", CLASSES)
def test_defaults_are_valid_and_survive_json(settings: type[Settings]) -> None:
    assert settings.model_validate_json(settings().model_dump_json(), strict=True) == settings()


@pytest.mark.parametrize("settings", CLASSES)
def test_unknown_keys_are_refused(settings: type[Settings]) -> None:
    with pytest.raises(ValidationError, match="extra_forbidden"):
        settings.model_validate({"no_such_key": 1})


@pytest.mark.parametrize("settings", CLASSES)
def test_values_cannot_be_changed_afterwards(settings: type[Settings]) -> None:
    key = next(iter(settings.model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(settings(), key, None)


@pytest.mark.parametrize("settings", CLASSES)
def test_whatever_may_be_none_is_none_by_default(settings: type[Settings]) -> None:
    """TOML has no null: leaving the key out is the only way to write it."""
    for key, field in settings.model_fields.items():
        assert NoneType not in get_args(field.annotation) or field.default is None, key


@given(write_strength=st.floats(0.001, 4), dead_zone=st.floats(0, 0.999), saturation=st.floats(0.001, 1))
def test_the_memory_is_stable_and_trainable(write_strength: float, dead_zone: float, saturation: float) -> None:
    values = {"write_strength": write_strength, "dead_zone": dead_zone, "saturation": saturation}
    if write_strength < 2 and dead_zone < saturation:
        assert FastWeightsConfig(**values).model_dump(include=set(values)) == values
    else:
        with pytest.raises(ValidationError, match=r"stability bound|must lie above dead_zone"):
            FastWeightsConfig(**values)


def test_stability_error_names_value_bound_and_remedy() -> None:
    with pytest.raises(ValidationError, match=r"write_strength = 2\.5 is beyond .* Choose a value below 2"):
        FastWeightsConfig(write_strength=2.5)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_no_number_is_infinite(value: float) -> None:
    with pytest.raises(ValidationError, match="finite"):
        TrainingConfig(kl_weight=value)


@pytest.mark.parametrize("value", [(), (-1,), ("a",)])
def test_gaps_are_lengths(value: tuple[object, ...]) -> None:
    with pytest.raises(ValidationError):
        EvaluationConfig.model_validate({"gaps_tokens": value})


@pytest.mark.parametrize("value", ["auto", (0,), (1, 3)])
def test_layers_are_numbers_or_auto(value: object) -> None:
    assert FastWeightsConfig.model_validate({"layers": value}).layers == value
