"""Links between memories: near in memory, near in the stream, read together. Undirected, at most a few per memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cortex_core.config import MemoryGraphConfig

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
_BLOCK = 512  # rows whose cosines with all others are in memory at once


class Links(NamedTuple):
    """Pairs of places, the lower first, in order; and what links them, each part with its weight in it."""

    ends: IntArray
    """[links, 2]"""
    similarity: FloatArray
    """[links]"""
    nearness: FloatArray
    """[links]"""
    together: FloatArray
    """[links]"""

    @property
    def weight(self) -> FloatArray:
        """Sum of the parts, above 0. [links]"""
        return self.similarity + self.nearness + self.together


def links(addresses: NDArray[np.float32], positions: IntArray, segments: IntArray, config: MemoryGraphConfig) -> Links:
    """Links of memories with these addresses [memories, width], positions and segments [memories].

    Each memory proposes its nearest in each respect; a proposed pair has all three parts, whoever proposed it and why.
    """
    size = len(positions)
    lengths = np.linalg.norm(addresses, axis=1, keepdims=True)
    unit = (addresses / np.where(lengths > 0, lengths, 1)).astype(np.float32)
    proposed = [
        pair
        for weight, pairs in (
            (config.similarity_weight, _similar(unit, config.neighbours)),
            (config.time_weight, _consecutive(np.argsort(positions, kind="stable"), -(-config.neighbours // 2))),
            (config.together_weight, _in_segment(positions, segments, config.neighbours)),
        )
        if weight > 0
        for pair in pairs
    ]
    codes = np.unique(np.concatenate([np.zeros(0, np.int64), *(p.min(1) * size + p.max(1) for p in proposed)]))
    one, other = np.divmod(codes, max(size, 1))
    cosine = np.einsum("ij,ij->i", unit[one], unit[other], dtype=np.float64)
    distance = np.abs(positions[one] - positions[other])
    found = Links(
        np.stack([one, other], axis=1),
        config.similarity_weight * np.clip(cosine, 0, 1),
        config.time_weight * np.exp(-distance / config.time_tokens),
        config.together_weight * (segments[one] == segments[other]).astype(float),
    )
    linked = found.weight > 0
    return Links(found.ends[linked], found.similarity[linked], found.nearness[linked], found.together[linked])


def _similar(unit: NDArray[np.float32], count: int) -> Iterator[IntArray]:
    """Each with the `count` most similar others."""
    size = len(unit)
    count = min(count, size - 1)
    if count < 1:
        return
    for first in range(0, size, _BLOCK):
        rows = np.arange(first, min(first + _BLOCK, size))
        cosines = unit[rows] @ unit.T
        cosines[np.arange(len(rows)), rows] = -np.inf
        nearest = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
        yield np.stack([np.repeat(rows, count), nearest.ravel()], axis=1)


def _consecutive(order: IntArray, count: int) -> Iterator[IntArray]:
    """Each with the `count` that come next."""
    for step in range(1, min(count, len(order) - 1) + 1):
        yield np.stack([order[:-step], order[step:]], axis=1)


def _in_segment(positions: IntArray, segments: IntArray, count: int) -> Iterator[IntArray]:
    """Each with the `count` that come next in its segment."""
    for pair in _consecutive(np.lexsort((positions, segments)), count):
        yield pair[segments[pair[:, 0]] == segments[pair[:, 1]]]
