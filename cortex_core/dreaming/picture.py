"""A picture of the graph as plain data: where memories stand, what links them, where a walk went."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cortex_core.dreaming.graph import MemoryGraph
from cortex_core.errors import DataError

FloatArray = NDArray[np.float64]
_GOLDEN = np.pi * (3 - np.sqrt(5))


class Node(NamedTuple):
    """A memory in the picture; x and y lie in 0 to 1."""

    id: int
    x: float
    y: float
    importance: float
    segment: int


class Edge(NamedTuple):
    """A link; ids of memories, and what of its weight comes from what."""

    one: int
    other: int
    similarity: float
    nearness: float
    together: float


class Picture(NamedTuple):
    """Everything that is drawn."""

    nodes: list[Node]
    edges: list[Edge]
    walk: list[tuple[float, float]]
    """Where a walk went, point by point."""


def picture(graph: MemoryGraph, walk: Sequence[int] = (), *, most: int = 400, rounds: int = 80) -> Picture:
    """The memories on `walk`, which are ids, and the most important of the others, `most` in all. The same graph gives
    the same picture. Raises DataError for a walk over memories that are not there."""
    strange = [number for number in walk if number not in graph.places]
    if strange:
        raise DataError(f"memory {strange[0]} of the walk is not in the graph: draw it with the graph that it was on")
    on_walk = {graph.places[number] for number in walk}
    by_importance = sorted(range(len(graph)), key=lambda p: (p not in on_walk, -graph.memories[p].importance, p))
    shown = np.array(sorted(by_importance[: max(most, len(on_walk))]), dtype=np.int64)
    inside = np.isin(graph.links.ends, shown).all(axis=1)
    ends = np.searchsorted(shown, graph.links.ends[inside])
    points = layout(len(shown), ends, graph.links.weight[inside], rounds)
    memories = [graph.memories[place] for place in shown]
    nodes = [
        Node(memory.id, float(x), float(y), memory.importance, memory.segment)
        for memory, (x, y) in zip(memories, points, strict=True)
    ]
    parts = zip(*(part[inside].tolist() for part in graph.links[1:]), strict=True)
    edges = [Edge(memories[a].id, memories[b].id, *part) for (a, b), part in zip(ends.tolist(), parts, strict=True)]
    at = {node.id: (node.x, node.y) for node in nodes}
    return Picture(nodes, edges, [at[number] for number in walk])


def layout(size: int, ends: NDArray[np.int64], weights: FloatArray, rounds: int) -> FloatArray:
    """Points [size, 2] in the unit square: all repel each other, links pull, by shrinking steps (Fruchterman and
    Reingold 1991), from a spiral on which neighbours in order stand apart but not far."""
    if not size:
        return np.zeros((0, 2))
    number = np.arange(size)
    points = np.sqrt((number + 0.5) / size)[:, None] * np.stack([np.cos(number * _GOLDEN), np.sin(number * _GOLDEN)], 1)
    apart = np.sqrt(1.0 / size)
    pulls = weights / max(weights.max(initial=0.0), 1e-12)
    for turn in range(rounds):
        offset = points[:, None] - points[None]
        distance = np.sqrt((offset**2).sum(-1)).clip(min=1e-9)
        force = (offset * (apart / distance)[..., None] ** 2).sum(1)
        along = points[ends[:, 0]] - points[ends[:, 1]]
        pull = along * (pulls * np.sqrt((along**2).sum(-1)) / apart)[:, None]
        np.add.at(force, ends[:, 0], -pull)
        np.add.at(force, ends[:, 1], pull)
        force -= points * apart  # unlinked parts do not drift off
        length = np.sqrt((force**2).sum(-1, keepdims=True)).clip(min=1e-12)
        points = points + force / length * np.minimum(length, 0.1 * (1 - turn / rounds))
    low, high = points.min(0), points.max(0)
    span = np.where(high - low > 1e-9, high - low, 1.0)
    return np.where(high - low > 1e-9, (points - low) / span, 0.5)
