"""Random walks with restart over weighted links (Tong, Faloutsos and Pan 2006), many at once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


class Steps(NamedTuple):
    """Where a step may lead: the neighbours of each place, row after row, with cumulative probabilities."""

    to: IntArray
    """[steps]"""
    cumulative: FloatArray
    """Probability of a step of this row up to this one, plus the number of the row; rising throughout. [steps]"""

    @classmethod
    def along(cls, ends: IntArray, weights: FloatArray, size: int) -> Steps:
        """Steps along links [links, 2], each either way, in proportion to the weights [links]. Whoever has no link
        stays where it is."""
        alone = np.setdiff1d(np.arange(size), ends)
        source = np.concatenate([ends[:, 0], ends[:, 1], alone])
        to = np.concatenate([ends[:, 1], ends[:, 0], alone])
        weight = np.concatenate([weights, weights, np.ones(len(alone))])
        order = np.lexsort((to, source))
        source, to, weight = source[order], to[order], weight[order]
        running = np.cumsum(weight)
        last = np.searchsorted(source, np.arange(size), side="right") - 1
        before = np.concatenate([[0.0], running[last]])[source]
        total = np.bincount(source, weight, size)[source]
        cumulative = source + np.clip((running - before) / total, 0, 1)
        cumulative[last] = np.arange(size) + 1.0  # rounding must not leave a gap at the end of a row
        return cls(to, cumulative)

    def taken(self, places: IntArray, draws: FloatArray) -> IntArray:
        """From each place, the step that a draw from [0, 1) takes."""
        at = np.minimum(places + draws, np.nextafter(places + 1.0, 0))  # a sum may round up into the next row
        return self.to[np.searchsorted(self.cumulative, at, side="right")]


def walks(steps: Steps, starts: IntArray, draws: FloatArray, restart: float) -> IntArray:
    """Places on each walk, the start first: [walks, length + 1]. `draws` [walks, length, 2] from [0, 1): whether a step
    restarts, and where it goes otherwise. A walk depends on its own draws alone."""
    path = [starts]
    for again, where in np.moveaxis(draws, 0, -1):
        path.append(np.where(again < restart, starts, steps.taken(path[-1], where)))
    return np.stack(path, axis=1)


def visit_law(ends: IntArray, weights: FloatArray, size: int, start: int, restart: float) -> FloatArray:
    """Share of its steps that an endless walk from `start` spends at each place: c (I - (1 - c) Wᵀ)⁻¹ e. Exact, by a
    dense solve: for small graphs."""
    chances = np.zeros((size, size))
    chances[ends[:, 0], ends[:, 1]] = chances[ends[:, 1], ends[:, 0]] = weights
    totals = chances.sum(1)
    chances[totals == 0, totals == 0] = 1.0
    chances /= chances.sum(1, keepdims=True)
    begin = np.eye(size)[start]
    return restart * np.linalg.solve(np.eye(size) - (1 - restart) * chances.T, begin)
