"""Slow weights that earlier nights have learned are held, by as much as their answers depend on them, or scaled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cortex_core.config import FisherConfig, ReplayConfig, ScalingConfig
from cortex_core.consolidation import sleep
from cortex_core.consolidation.elastic import FISHER
from cortex_core.consolidation.scaling import unit_norms
from cortex_core.consolidation.sleeper import Sleeper
from cortex_core.errors import DataError
from tests.consolidation import sleepers

SETTINGS = sleepers.QUICK.model_copy(update={"replayed": 0, "steps": 6})


def reader(**parts: FisherConfig | ScalingConfig) -> Sleeper:
    return Sleeper(sleepers.fresh_model(), SETTINGS, ReplayConfig(), encode=sleepers.encode, **parts)  # type: ignore[arg-type]


def values(of: Sleeper) -> Tensor:
    return torch.cat([value.detach().clone() for value in sleep.slow_values(of.model).values()])


@pytest.fixture(scope="module")
def held() -> Sleeper:
    """After three nights, an epoch each, held firmly."""
    sleeper = reader(fisher=FisherConfig(weight=1e9, epoch_nights=1))
    sleeper.read(sleepers.stream())
    return sleeper


def test_what_old_answers_depend_on_stays(held: Sleeper) -> None:
    """From the first night on: the slots that its lessons depend on hardly move any more, in a reader without they do."""
    free, early = reader(), reader()
    early.read(sleepers.stream(1))
    free.read(sleepers.stream())
    first = values(early)
    touched = first.abs().sum(1) > 0
    assert touched.any()
    assert float((values(free) - first)[touched].norm()) > 3 * float((values(held) - first)[touched].norm()) > 0
    assert held.elastic is not None and held.elastic.fisher.num_epochs == 3 and held.elastic.fisher.trace > 0


def test_an_evening_takes_what_is_held_along(held: Sleeper) -> None:
    assert held.elastic is not None
    found = held.elastic.held()
    assert found is not None
    lessons = sleepers.a_lesson(held.model)
    evening = sleep.Evening(lessons, [], held=found)
    again = sleep.Evening.from_tensors(evening.tensors(), torch.device("cpu")).held
    assert again is not None
    now = sleep.slow_values(held.model)
    assert float(again.penalty(now)) == float(found.penalty(now)) == 0.0, "the last epoch ended here"
    moved = {name: value + 0.1 for name, value in now.items()}
    expected = sum(float((found.importance[name] * 0.01).sum()) / 2 for name in now)
    assert float(again.penalty(moved)) == pytest.approx(expected, rel=1e-3)


def test_epochs_are_so_many_nights_long() -> None:
    sleeper = reader(fisher=FisherConfig(weight=1.0, epoch_nights=2))
    sleeper.read(sleepers.stream(1))
    assert sleeper.elastic is not None and sleeper.elastic.held() is None
    assert sleeper.elastic.fisher.num_examples > 0
    sleeper.read(sleepers.stream(2)[sleepers.DAY + 1 :])
    assert sleeper.elastic.fisher.num_epochs == 1 and sleeper.elastic.fisher.num_examples == 0
    assert reader(fisher=FisherConfig()).elastic is None, "a weight of 0 measures nothing"


def test_what_is_held_goes_on_from_files(held: Sleeper, tmp_path: Path) -> None:
    held.save(tmp_path)
    assert held.elastic is not None
    again = reader(fisher=FisherConfig(weight=1e9, epoch_nights=1))
    again.load(tmp_path)
    assert again.elastic is not None
    for name, value in held.elastic.fisher.values.items():
        assert torch.equal(again.elastic.fisher.values[name], value)
    (tmp_path / FISHER).unlink()
    with pytest.raises(DataError, match=r"fisher\.safetensors: there is no such file"):
        again.load(tmp_path)


def test_scaling_brings_slots_to_a_norm() -> None:
    sleeper = reader(scaling=ScalingConfig(rate=1.0, target_norm=2.0, max_factor=1e6))
    sleeper.read(sleepers.stream(1))
    norms = unit_norms(values(sleeper))
    used = norms > 0
    assert used.any() and not used.all()
    torch.testing.assert_close(norms[used], torch.full_like(norms[used], 2.0), rtol=1e-4, atol=1e-4)
    plain = reader(scaling=ScalingConfig())
    plain.read(sleepers.stream(1))
    free = reader()
    free.read(sleepers.stream(1))
    assert torch.equal(values(plain), values(free))
