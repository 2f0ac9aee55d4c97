"""A life in tasks: days become tasks, and all of them are asked for after each."""

from __future__ import annotations

import pytest

from cortex_core.config import LifeConfig, ReplayConfig
from cortex_core.errors import ConfigError
from cortex_core.eval.continual import AccuracyMatrix
from cortex_core.training.continual import accuracies, learn_in_sequence, tasks_of
from cortex_core.training.life import Life, new_sleeper
from tests.consolidation import sleepers


def new_life(num_facts: int, facts_per_day: int = 3) -> Life:
    settings = sleepers.QUICK.model_copy(update={"guard_windows": 0})
    sleeper = new_sleeper(sleepers.fresh_model(), sleepers.encode, sleepers.corpus(), settings, ReplayConfig())
    config = LifeConfig(num_facts=num_facts, facts_per_day=facts_per_day)
    return Life(sleeper, config, sleepers.book().vocabulary, sleepers.book().filler)


def test_tasks_are_whole_days_as_even_as_can_be() -> None:
    life = new_life(2000, 8)
    tasks = tasks_of(life, 30)
    assert [day for days in tasks for day in days] == list(range(250))
    assert {len(days) for days in tasks} == {8, 9}
    for count in (0, 251):
        with pytest.raises(ConfigError, match=rf"num_tasks = {count}: 250 days make at most as many tasks"):
            tasks_of(life, count)


def test_all_tasks_are_asked_for_after_each() -> None:
    life, over = new_life(10), []
    rows = list(learn_in_sequence(life, 2, task_over=lambda: over.append(life.day)))
    assert over == [2, 4], "two days each, four and six facts"
    matrix = AccuracyMatrix.of(rows[0], rows[1:])
    assert matrix.before.tolist() == [0, 0] and matrix.after[0, 1] == 0, "who was never told does not know"
    assert matrix.learned >= 0.8 and matrix.acc >= 0.8
    right = life.recalled(range(10), 40).tolist()
    assert accuracies(life, tasks_of(life, 2)) == [sum(right[:6]) / 6, sum(right[6:]) / 4] == rows[-1]
