"""A life of facts: days and nights come in step, and what was told is known without the fast weights."""

from __future__ import annotations

import pytest
import torch

from cortex_core.config import LifeConfig, ReplayConfig
from cortex_core.errors import ConfigError
from cortex_core.training.life import Day, Life, new_sleeper
from tests.consolidation import sleepers

LIFE = LifeConfig(num_facts=10, facts_per_day=4, lead_tokens=(0, 30))


def new_life(config: LifeConfig = LIFE, **sleep: object) -> Life:
    settings = sleepers.QUICK.model_copy(update={"guard_windows": 2, **sleep})
    sleeper = new_sleeper(sleepers.fresh_model(), sleepers.encode, sleepers.corpus(), settings, ReplayConfig())
    return Life(sleeper, config, sleepers.book().vocabulary, sleepers.book().filler)


@pytest.fixture(scope="module")
def lived() -> tuple[Life, list[list[bool]], list[Day]]:
    """A whole life, what was known before it, and its days."""
    life = new_life()
    assert life.num_days == 3 and life.day == 0 and [*life.told_on(2)] == [8, 9] and not life.told_on(3)
    before = life.known()
    return life, before, list(life.live())


def test_a_life_has_a_night_after_each_day_and_knows_in_the_end(
    lived: tuple[Life, list[list[bool]], list[Day]],
) -> None:
    life, before, days = lived
    assert [day.number for day in days] == [0, 1, 2] and [len(day.nights) for day in days] == [1, 1, 1]
    assert life.day == 3 and not list(life.live())
    after = life.known()
    assert [len(right) for right in after] == [10, 10]
    assert sum(map(sum, before)) == 0 and all(sum(right) >= 8 for right in after)


def test_a_life_goes_on_within_a_day(lived: tuple[Life, list[list[bool]], list[Day]]) -> None:
    """What is left of a day that has begun is what had not been read."""
    whole, parted = lived[0], new_life()
    parted.sleeper.read(parted.book.day(0, parted.told_on(0), sleepers.DAY)[:100])
    assert [len(day.nights) for day in parted.live()] == [1, 1, 1]
    assert parted.sleeper.num_tokens == whole.sleeper.num_tokens
    for mine, theirs in zip(whole.known(), parted.known(), strict=True):
        assert sum(a == b for a, b in zip(mine, theirs, strict=True)) >= 9


def test_questions_do_not_depend_on_what_else_is_asked(lived: tuple[Life, list[list[bool]], list[Day]]) -> None:
    life = lived[0]
    assert torch.equal(life.recalled(range(10), 30)[[7, 2]], life.recalled([7, 2], 30))


def test_days_are_whole_segments() -> None:
    with pytest.raises(ConfigError, match=r"sleep.every_tokens = 300: .* multiple of 256, .* Set it to 512"):
        new_life(every_tokens=300)
    with pytest.raises(ConfigError, match="tell fewer"):
        new_life(LIFE.model_copy(update={"num_facts": 200, "facts_per_day": 100}))
