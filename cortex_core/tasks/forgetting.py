"""Selective forgetting: a key is told again with a new value, and only the latest value is an answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cortex_core.errors import ConfigError
from cortex_core.tasks.key_value import KeyValue
from cortex_core.tasks.layout import Sheet, rounds


@dataclass(frozen=True)
class Forgetting(KeyValue):
    """Key-value recall in which each of `num_pairs` keys is told one to three times, with another value each time.

    There are twice as many facts as keys, in random order: on average every key is told again once.
    """

    name: ClassVar[str] = "forgetting"

    def __post_init__(self) -> None:
        """Raises ConfigError when there are fewer keys than `num_pairs`, or fewer than three values."""
        super().__post_init__()
        if self.num_pairs < 2:
            raise ConfigError(f"num_pairs = {self.num_pairs} must be at least 2: one key tells nothing apart")
        self.check_words(self.num_pairs, 3)

    def sheet(self, index: int, num_queries: int) -> Sheet:
        rng = self.rng(index)
        key_pool, value_pool = self.pools(index)
        keys = rng.choice(key_pool, self.num_pairs, replace=False).tolist()
        everyone = np.arange(self.num_pairs)
        again = rng.choice(np.repeat(everyone, 2), self.num_pairs, replace=False)
        order = rng.permutation(np.concatenate([everyone, again]))
        values = [iter(rng.choice(value_pool, 3, replace=False).tolist()) for _ in keys]
        told = [(keys[pair], next(values[pair])) for pair in order]
        latest = dict(told)
        return Sheet(
            facts=[self.line(" remember", fact) for fact in told],
            queries=[
                self.line(" recall", (keys[pair], latest[keys[pair]]), num_answers=1)
                for pair in rounds(rng, self.num_pairs, num_queries)
            ],
        )
