"""The picture's data: everything that is linked and walked, at places that are always the same."""

from __future__ import annotations

import numpy as np
import pytest

from cortex_core.config import MemoryGraphConfig
from cortex_core.dreaming.graph import MemoryGraph
from cortex_core.dreaming.picture import layout, picture
from cortex_core.errors import DataError
from tests.dreaming.scenes import memories, memory

GRAPH = MemoryGraph.of(memories(24), MemoryGraphConfig(neighbours=3))


def test_nodes_edges_and_walk_are_those_of_the_graph() -> None:
    walk = [3, 5, 3, 20]
    found = picture(GRAPH, walk)
    assert [node.id for node in found.nodes] == list(range(24))
    assert all(0 <= node.x <= 1 and 0 <= node.y <= 1 for node in found.nodes)
    assert [(e.one, e.other) for e in found.edges] == [tuple(pair) for pair in GRAPH.links.ends.tolist()]
    parts = [e.similarity + e.nearness + e.together for e in found.edges]
    assert parts == pytest.approx(GRAPH.links.weight.tolist())
    assert found.walk == [(found.nodes[number].x, found.nodes[number].y) for number in walk]


def test_the_same_graph_gives_the_same_picture() -> None:
    assert picture(GRAPH) == picture(MemoryGraph.of(memories(24), GRAPH.config))


def test_of_too_many_the_walk_and_the_most_important_are_shown() -> None:
    graph = MemoryGraph.of([memory(n, importance=n) for n in range(10)])
    found = picture(graph, [1, 0, 1], most=4)
    assert [node.id for node in found.nodes] == [0, 1, 8, 9]
    assert {end for edge in found.edges for end in (edge.one, edge.other)} <= {0, 1, 8, 9}
    assert len(picture(graph, [1, 0, 2], most=2).nodes) == 3, "a walk is shown whole"


def test_who_is_linked_stands_nearer() -> None:
    """Two groups of eight, linked within."""
    pairs = np.array([(a, b) for a in range(16) for b in range(a + 1, 16) if a % 2 == b % 2])
    points = layout(16, pairs, np.ones(len(pairs)), 80)
    apart = np.linalg.norm(points[:, None] - points[None], axis=-1)
    same = np.equal.outer(np.arange(16) % 2, np.arange(16) % 2)
    assert apart[same].sum() / (same.sum() - 16) < 0.7 * apart[~same].mean()
    assert (apart + np.eye(16)).min() > 0.01, "none stands on another"


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_memories_are_drawn_as_well(count: int) -> None:
    found = picture(MemoryGraph.of(memories(count)))
    assert len(found.nodes) == count and np.isfinite([(n.x, n.y) for n in found.nodes]).all()


def test_a_walk_over_strangers_is_refused() -> None:
    with pytest.raises(DataError, match="memory 99 of the walk is not in the graph"):
        picture(GRAPH, [1, 99])
