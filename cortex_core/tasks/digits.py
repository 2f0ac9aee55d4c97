"""Tasks on numbers, which can be made easier: with fewer digits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from cortex_core.tasks.layout import TextTask

_FEWEST = 2


@dataclass(frozen=True)
class DigitTask(TextTask):
    """A task whose facts grow with the number of digits."""

    num_digits: int = 12

    def smaller(self, rng: np.random.Generator) -> Self:
        """The same task with fewer digits, as many as are drawn; two at least."""
        return replace(self, num_digits=int(rng.integers(_FEWEST, self.num_digits)))

    def fitting(self, tokens: int, *, num_queries: int = 1) -> Self:
        """The same task with as many of its digits as have room in `tokens`, questions included; two at least."""
        task = self
        while task.num_digits > _FEWEST and task.overhead_tokens(0, num_queries=num_queries) > tokens:
            task = replace(task, num_digits=task.num_digits - 1)
        return task
