"""A life in tasks: its days one task after the other, and all tasks asked for after each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from cortex_core.errors import ConfigError
from cortex_core.training.life import Life

LEAD_TOKENS = 40
"""Held-out text before each question of a probe: in no lesson does a question stand behind other text."""


def tasks_of(life: Life, count: int) -> list[range]:
    """Days of each task: whole days in order, as even as they can be. Raises ConfigError for fewer days than tasks."""
    if not 1 <= count <= life.num_days:
        raise ConfigError(
            f"num_tasks = {count}: {life.num_days} days make at most as many tasks; tell more facts, or fewer a day"
        )
    return [range(int(days[0]), int(days[-1]) + 1) for days in np.array_split(np.arange(life.num_days), count)]


def accuracies(life: Life, tasks: Sequence[range], lead_tokens: int = LEAD_TOKENS) -> list[float]:
    """Of each task's facts, told or not yet, the share that is known now with empty fast weights."""
    right = life.recalled(range(life.config.num_facts), lead_tokens).tolist()
    facts = [slice(life.told_on(days[0]).start, life.told_on(days[-1]).stop) for days in tasks]
    return [sum(right[part]) / len(right[part]) for part in facts]


def learn_in_sequence(
    life: Life, count: int, lead_tokens: int = LEAD_TOKENS, task_over: Callable[[], None] = lambda: None
) -> Iterator[list[float]]:
    """Live a life that has not begun, in `count` tasks. Yields the accuracies on all tasks, first before anything is
    told, then after each task: `AccuracyMatrix.of(first, rest)`. `task_over` is called before these are measured."""
    tasks = tasks_of(life, count)
    yield accuracies(life, tasks, lead_tokens)
    last = {days[-1] for days in tasks}
    for day in life.live():
        if day.number in last:
            task_over()
            yield accuracies(life, tasks, lead_tokens)
