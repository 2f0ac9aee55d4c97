"""The graph as a value: what it keeps, what is on record, which walks it gives, and its file."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from cortex_core import files
from cortex_core.config import MemoryGraphConfig
from cortex_core.dreaming.graph import SCHEMA, MemoryGraph
from cortex_core.errors import DataError
from tests.dreaming.scenes import ASK, memories, memory

SMALL = MemoryGraphConfig(max_memories=3, walk_steps=5, max_pairs=4)


def ids(graph: MemoryGraph) -> list[int]:
    return [found.id for found in graph.memories]


def test_the_least_important_go_and_of_equals_the_older() -> None:
    importance = [2.0, 1.0, 3.0, 1.0, 1.0]
    graph = MemoryGraph.of([memory(n, importance=i) for n, i in enumerate(importance)], SMALL)
    assert ids(graph) == [0, 2, 4]
    assert ids(graph.with_memories([memory(9, importance=2.5)])) == [0, 2, 9]


def test_what_was_replaced_goes_first_however_important() -> None:
    """Or the record would answer with what held before."""
    old, new = memory(0, importance=9.0), memory(1, cue=memory(0).cue, importance=0.1)
    graph = MemoryGraph.of([old, new, memory(2), memory(3)], SMALL)
    assert ids(graph) == [1, 2, 3]
    assert graph.record[old.cue] == new.answer


def test_of_memories_that_share_a_cue_the_newest_is_on_record() -> None:
    cue = (ASK, 1)
    told = [memory(0, cue=cue, position=90), memory(1, cue=cue, position=10), memory(2, cue=cue, position=90)]
    assert MemoryGraph.of(told).record == {cue: told[2].answer}


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 1.0, 2.0])), max_size=12))
def test_the_record_is_never_older_than_that_of_all(told: list[tuple[int, float]]) -> None:
    everything = [memory(n, cue=(ASK, key), importance=i) for n, (key, i) in enumerate(told)]
    whole, bounded = MemoryGraph.of(everything), MemoryGraph.of(everything, SMALL)
    assert len(bounded) == min(3, len(everything))
    assert all(whole.record[cue] == answer for cue, answer in bounded.record.items())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"id": 0}, "memory 0 is there twice"),
        ({"importance": -1.0}, "importance = -1.0 must be finite and at least 0"),
        ({"address": np.full(6, np.nan, np.float32)}, "must be a vector of finite numbers"),
        ({"address": np.ones(5, np.float32)}, "a graph holds memories of one model"),
        ({"cue": ()}, "has no cue"),
    ],
)
def test_memories_that_cannot_be_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        MemoryGraph.of([memory(0), memory(1, **wrong)])


# --- walks -----------------------------------------------------------------------------------------------------------


def test_the_same_ticket_gives_the_same_walk_in_any_company() -> None:
    graph = MemoryGraph.of(memories(20))
    tickets = [5, 0, 123_456_789, 7]
    together = graph.walks(tickets, seed=3)
    assert together.shape == (4, 13)
    for ticket, walk in zip(tickets, together, strict=True):
        assert graph.walks([ticket], seed=3).tolist() == [walk.tolist()]
    assert (graph.walks(tickets, seed=4) != together).any()


def test_walks_begin_by_importance() -> None:
    graph = MemoryGraph.of([memory(0, importance=0.0), memory(1, importance=1.0), memory(2, importance=3.0)])
    starts = np.bincount(graph.walks(range(4000), seed=0)[:, 0], minlength=3) / 4000
    assert starts == pytest.approx([0, 0.25, 0.75], abs=0.03)


def test_without_any_importance_walks_begin_anywhere() -> None:
    graph = MemoryGraph.of([memory(n, importance=0.0) for n in range(4)])
    assert set(graph.walks(range(100), seed=0)[:, 0].tolist()) == {0, 1, 2, 3}


def test_there_is_no_walk_over_nothing() -> None:
    with pytest.raises(DataError, match="holds no memory"):
        MemoryGraph.of([]).walks([0], seed=0)


def test_links_are_shares_of_the_strongest() -> None:
    graph = MemoryGraph.of(memories(8))
    order = [3, 0, 7, 1, 2, 6, 5, 4]
    shares, met = graph.among(order)
    weights = np.zeros((8, 8))
    for (one, other), weight in zip(graph.links.ends, graph.links.weight, strict=True):
        weights[one, other] = weights[other, one] = weight
    assert shares == pytest.approx(weights[np.ix_(order, order)] / weights.max()) and shares.max() == 1.0
    assert not met.any()
    assert MemoryGraph.of([memory(0)]).among([0])[0].tolist() == [[0.0]]


def test_no_links_at_all_are_refused() -> None:
    with pytest.raises(ValidationError, match="no memory is linked"):
        MemoryGraphConfig(similarity_weight=0.0, time_weight=0.0, together_weight=0.0)


# --- who met whom ----------------------------------------------------------------------------------------------------


def test_it_is_remembered_who_met_in_a_dream() -> None:
    graph = MemoryGraph.of([memory(n) for n in (3, 5, 8)], SMALL)
    after = graph.after([(5, 3), (3, 8, 3), (3, 5)])
    assert after.among([0, 1, 2])[1].tolist() == [[0, 2, 1], [2, 0, 0], [1, 0, 0]]
    assert after.among([2, 0])[1].tolist() == [[0, 1], [1, 0]]
    assert not graph.met, "a graph is a value"


def test_pairs_are_bounded_and_go_with_their_memories() -> None:
    graph = MemoryGraph.of([memory(n, importance=n) for n in range(3)], SMALL)
    after = graph.after([(a, b) for a in range(6) for b in range(a)])
    assert len(after.met) == 4 and (4, 5) in after.met
    met = graph.after([(0, 1), (1, 2)]).with_memories([memory(7)]).met
    assert dict(met) == {(1, 2): 1}


def test_a_graph_travels_to_other_processes() -> None:
    graph = MemoryGraph.of(memories(6)).after([(0, 1)])
    again = pickle.loads(pickle.dumps(graph))
    assert again.met == graph.met and again.walks([3], seed=0).tolist() == graph.walks([3], seed=0).tolist()


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    graph = MemoryGraph.of([memory(0, answer=()), *memories(5)[1:]], MemoryGraphConfig(time_tokens=9.0))
    graph.after([(0, 3), (1, 3), (0, 3)]).save(tmp_path / "deep" / "graph.safetensors")
    return tmp_path / "deep" / "graph.safetensors"


def test_a_loaded_graph_is_the_saved_one(saved: Path) -> None:
    again = MemoryGraph.load(saved)
    assert again.config == MemoryGraphConfig(time_tokens=9.0)
    assert list(again.met.items()) == [((0, 3), 2), ((1, 3), 1)]
    for found, expected in zip(again.memories, [memory(0, answer=()), *memories(5)[1:]], strict=True):
        assert found._replace(address=None) == expected._replace(address=None)
        assert found.address.tolist() == expected.address.tolist()
    expected = MemoryGraph.of(memories(5), again.config).walks(range(9), seed=1)
    assert again.walks(range(9), seed=1).tolist() == expected.tolist()


def test_an_empty_graph_is_saved_as_well(tmp_path: Path) -> None:
    MemoryGraph.of([]).save(tmp_path / "graph.safetensors")
    assert len(MemoryGraph.load(tmp_path / "graph.safetensors")) == 0


DAMAGE = {
    "a memory is missing": lambda notes: notes["memories"].pop(),
    "an id comes twice": lambda notes: notes["memories"][1].update(id=0),
    "a token is text": lambda notes: notes["memories"][1].update(cue=["recall"]),
    "a token is negative": lambda notes: notes["memories"][1].update(tokens=[-1]),
    "a position is a fraction": lambda notes: notes["memories"][1].update(position=1.5),
    "an importance is text": lambda notes: notes["memories"][1].update(importance="much"),
    "a setting is wrong": lambda notes: notes["config"].update(restart=2.0),
    "strangers have met": lambda notes: notes["met"].append([0, 77, 1]),
    "a pair has met never": lambda notes: notes["met"].append([1, 2, 0]),
    "no list of memories": lambda notes: notes.update(memories=3),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_file_is_refused_in_one_line(saved: Path, what: str) -> None:
    tensors = load_file(saved)
    _, notes = files.read(saved, SCHEMA, "memory graph")
    DAMAGE[what](notes)
    save_file(tensors, saved, metadata={"schema": SCHEMA, "notes": json.dumps(notes)})
    with pytest.raises(DataError, match=r"memory graph .* damaged") as caught:
        MemoryGraph.load(saved)
    assert "\n" not in str(caught.value)
