"""What dreams are about: who collides, what stands where, and that chance decides the rest."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex_core.config import MemoryGraphConfig, ScenarioConfig
from cortex_core.dreaming.graph import MemoryGraph
from cortex_core.dreaming.scenario import Scenario, collision, scenarios
from tests.dreaming.scenes import memories, memory

GRAPH = MemoryGraph.of(memories(30), MemoryGraphConfig(neighbours=4))
CONFIG = ScenarioConfig(max_lines=3, max_filler_tokens=10)
TICKETS = range(300)


def made(config: ScenarioConfig = CONFIG, graph: MemoryGraph = GRAPH) -> list[Scenario]:
    return scenarios(graph, TICKETS, 0, config)


def test_a_ticket_gives_the_same_in_any_company() -> None:
    for ticket in (0, 7, 299):
        assert scenarios(GRAPH, [ticket], 0, CONFIG) == [made()[ticket]]
    assert made() != scenarios(GRAPH, TICKETS, 1, CONFIG)


def test_what_is_asked_and_told_lies_on_the_walk() -> None:
    for found in made():
        told = [line.id for line in found.lines]
        assert {found.asked.id, *told} <= set(found.walk)
        assert len(told) == len(set(told)) <= 3 and found.asked.id not in told
        assert found.context == GRAPH.memories[0].context


def test_lengths_vary_from_nothing_to_the_most() -> None:
    assert Counter(len(found.lines) for found in made()).keys() == {0, 1, 2, 3}
    assert Counter(found.num_filler for found in made()).keys() == set(range(11))
    assert min(len(found.prompt([0] * found.num_filler)) for found in made()) == 2


def test_the_line_of_what_is_asked_stands_in_as_many_as_it_may() -> None:
    assert all(found.asked in found.lines for found in made(ScenarioConfig(own_line_frac=1.0)))
    share = np.mean([found.asked in found.lines for found in made(ScenarioConfig(own_line_frac=0.3))])
    assert share == pytest.approx(0.3, abs=0.08)


def test_no_line_has_the_cue_that_is_asked() -> None:
    """Facts that were told again, with another value: each would be an answer."""
    twice = [*memories(6), *(memory(6 + n, cue=memory(n).cue) for n in range(6))]
    for found in made(graph=MemoryGraph.of(twice)):
        assert found.asked.cue not in [line.cue for line in found.lines]


def test_one_memory_is_asked_without_any_line() -> None:
    found = made(graph=MemoryGraph.of([memory(3)]))
    assert {len(scene.lines) for scene in found} == {0} and {scene.asked.id for scene in found} == {3}


def test_a_memory_without_context_gives_its_line() -> None:
    found = made(graph=MemoryGraph.of([memory(3, context=())]), config=ScenarioConfig(context_tokens=3))
    assert found[0].context == memory(3).tokens[-3:]


@given(st.lists(st.integers(0, 9), max_size=3), st.integers(0, 10))
def test_a_prompt_is_filler_with_lines_in_it_and_the_question(cuts: list[int], num_filler: int) -> None:
    cuts = sorted(min(cut, num_filler) for cut in cuts)
    lines = tuple(memory(n) for n in range(len(cuts)))
    filler = range(1000, 1000 + num_filler)
    prompt = Scenario((9,), memory(9), lines, tuple(cuts), (), num_filler).prompt(filler)
    assert prompt[-2:] == memory(9).cue
    assert [token for token in prompt if token >= 1000] == list(filler)
    before = [sum(token >= 1000 for token in prompt[: prompt.index(line.answer[0])]) for line in lines]
    assert before == cuts
    assert len(prompt) == num_filler + 4 * len(lines) + 2


# --- who collides ----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 29), min_size=2, max_size=8, unique=True), st.integers(0, 99))
def test_two_collide_that_are_linked_least(places: list[int], seed: int) -> None:
    found = collision(GRAPH, places, np.random.default_rng(seed))
    assert sorted(found) == sorted(places)
    shares = GRAPH.among(found)[0]
    assert shares[0, 1] == shares[~np.eye(len(found), dtype=bool)].min()
    for at in range(2, len(found)):
        sums = shares[:at].sum(0)[at:]
        assert sums[0] == pytest.approx(sums.min())


def test_who_met_before_is_passed_over() -> None:
    places = [0, 11, 22]
    fresh = collision(GRAPH, places, np.random.default_rng(0))[:2]
    after = GRAPH.after([fresh])
    assert all(set(collision(after, places, np.random.default_rng(s))[:2]) != set(fresh) for s in range(20))


def test_over_many_dreams_all_pairs_meet() -> None:
    """Each dream counts, so pairs come in turn instead of the same ones again: those linked strongly less often."""
    graph = MemoryGraph.of(memories(4), MemoryGraphConfig(neighbours=1))
    for seed in range(60):
        graph = graph.after([collision(graph, range(4), np.random.default_rng(seed))[:2]])
    shares, met = graph.among(range(4))
    unlinked = [pair for pair in combinations(range(4), 2) if shares[pair] == 0]
    assert len(unlinked) >= 2 and max(met[pair] for pair in unlinked) - min(met[pair] for pair in unlinked) <= 1
    assert all(met[pair] <= met[unlinked[0]] + 1 for pair in combinations(range(4), 2))
