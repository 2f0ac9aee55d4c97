"""Learning one task after the other: what was reached, what was forgotten, what one task did for the next.

Nothing here knows what a task is. Everything is computed from one matrix of accuracies, which whoever runs the tasks
has filled; ACC, backward and forward transfer are those of Lopez-Paz and Ranzato (2017), "Gradient Episodic Memory for
Continual Learning", forgetting that of Chaudhry et al. (2018), "Riemannian Walk for Incremental Learning".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cortex_core.intervals import Interval, mean_interval


@dataclass(frozen=True)
class AccuracyMatrix:
    """Accuracies of T tasks that were learned in the order of their numbers, each asked for again and again.

    `before` [T]: of each task before the first was learned. `after` [T, T]: row t, column i is R[t, i], the accuracy on
    task i once task t was learned. All are shares in 0 to 1.
    """

    before: NDArray[np.float64]
    after: NDArray[np.float64]

    @classmethod
    def of(cls, before: ArrayLike, after: ArrayLike) -> AccuracyMatrix:
        """Of anything like two arrays. Raises ValueError for other shapes, or numbers that are no shares."""
        first, rest = np.array(before, dtype=np.float64), np.array(after, dtype=np.float64)
        if first.ndim != 1 or not first.size or rest.shape != (first.size, first.size):
            raise ValueError(
                f"before {list(first.shape)}, after {list(rest.shape)}: T tasks have [T] and [T, T] accuracies, T ≥ 1"
            )
        for name, part in (("before", first), ("after", rest)):
            if not ((part >= 0) & (part <= 1)).all():
                raise ValueError(
                    f"{name}: an accuracy of {part[~((part >= 0) & (part <= 1))][0]}: give shares in 0 to 1"
                )
        return cls(first, rest)

    @property
    def num_tasks(self) -> int:
        """T."""
        return len(self.before)

    @property
    def acc(self) -> float:
        """ACC, average accuracy: mean over i of R[T-1, i], after the last task (Lopez-Paz and Ranzato 2017)."""
        return float(self.after[-1].mean())

    @property
    def learned(self) -> float:
        """Mean over i of R[i, i], each task right after it: what there was to forget (Riemer et al. 2019 call it
        learning accuracy)."""
        return float(np.diagonal(self.after).mean())

    @property
    def bwt(self) -> float:
        """BWT, backward transfer: mean over i < T-1 of R[T-1, i] - R[i, i] (Lopez-Paz and Ranzato 2017).

        Negative where later tasks cost earlier ones something. Avalanche's forgetting is its opposite. NaN for T = 1.
        """
        return _mean((self.after[-1] - np.diagonal(self.after))[:-1])

    @property
    def fwt(self) -> float:
        """FWT, forward transfer: mean over i > 0 of R[i-1, i] - before[i] (Lopez-Paz and Ranzato 2017).

        What a task gains from those before it, before it is learned itself. 0 is right where tasks have nothing to say
        about each other. NaN for T = 1.
        """
        return _mean(np.diagonal(self.after, offset=1) - self.before[1:])

    @property
    def forgetting(self) -> float:
        """Mean over i < T-1 of max over t < T-1 of R[t, i], minus R[T-1, i] (Chaudhry et al. 2018, section 4).

        From the best that was ever reached, not from where learning the task ended, so never below -BWT. Negative only
        if the last task made earlier ones better than they had been. NaN for T = 1.
        """
        if self.num_tasks == 1:
            return math.nan
        return _mean((self.after[:-1].max(axis=0) - self.after[-1])[:-1])


class Measures(NamedTuple):
    """The mean over seeds of each measure, with its interval, as shares."""

    acc: Interval
    bwt: Interval
    fwt: Interval
    forgetting: Interval


def over_seeds(matrices: Sequence[AccuracyMatrix]) -> Measures:
    """Student's t interval (95 %) of every measure, one matrix per independent seed. A single seed has an interval as
    wide as the measure can be. Raises ValueError without any, or for tasks of which there is only one."""
    return Measures(
        mean_interval([matrix.acc for matrix in matrices], lowest=0.0, highest=1.0),
        *(
            mean_interval([getattr(matrix, name) for matrix in matrices], lowest=-1.0, highest=1.0)
            for name in ("bwt", "fwt", "forgetting")
        ),
    )


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if values.size else math.nan
