"""The simulator: what may happen, what then is where, and maps on which places have one neighbour on each side."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from cortex_core.tasks.world import Question, World, draw, map_of, simulate

ANN, BOB, CID = range(3)
HILL, PARK, YARD = range(10, 13)
CUP, HAT = 20, 21
WEIGHTS = {" went": 1.0, " got": 1.0, " put": 0.5, " gave": 1.0}


@pytest.fixture
def world() -> World:
    return World((ANN, BOB, CID), (HILL, PARK, YARD), (CUP, HAT))


def tell(world: World, *events: str) -> World:
    names = {
        "ann": ANN, "bob": BOB, "cid": CID, "hill": HILL, "park": PARK, "yard": YARD, "cup": CUP, "hat": HAT,
    }  # fmt: skip
    for event in events:
        verb, *words = event.split()
        move = tuple(names[word] for word in words)
        assert move in world.moves(f" {verb}"), f"{event} cannot happen"
        world.happen(f" {verb}", move)
    return world


def test_nothing_is_picked_up_given_or_dropped_before_it_can_be(world: World) -> None:
    assert len(world.moves(" went")) == 9
    assert world.moves(" got") == world.moves(" put") == world.moves(" gave") == []
    tell(world, "went ann hill")
    assert world.moves(" got") == [(ANN, CUP), (ANN, HAT)], "what no one has seen yet may lie anywhere"
    tell(world, "got ann cup", "went bob park")
    assert world.moves(" got") == [(ANN, HAT), (BOB, HAT)], "what someone has cannot be picked up"
    assert world.moves(" put") == [(ANN, CUP)]
    assert world.moves(" gave") == [], "no one else is there"
    tell(world, "went bob hill")
    assert world.moves(" gave") == [(ANN, CUP, BOB)]
    tell(world, "put ann cup", "went ann park")
    assert (ANN, CUP) not in world.moves(" got"), "it lies on the hill"
    assert (BOB, CUP) in world.moves(" got")


def test_an_object_goes_where_its_holder_goes_and_stays_where_it_is_dropped(world: World) -> None:
    tell(world, "went ann hill", "got ann cup", "went ann park", "went bob park", "gave ann cup bob", "went bob yard")
    tell(world, "put bob cup", "went bob hill")
    assert world.finds() == [Question(" find", (CUP,), YARD)]
    assert world.whereabouts() == [Question(" where", (ANN,), PARK), Question(" where", (BOB,), HILL)]
    assert world.befores() == [Question(" before", (CUP, PARK), HILL), Question(" before", (CUP, YARD), PARK)]


def test_before_is_not_asked_about_a_place_where_the_object_was_twice(world: World) -> None:
    tell(world, "went ann hill", "got ann cup", "went ann park", "went ann hill", "went ann yard")
    assert world.been == {CUP: [HILL, PARK, HILL, YARD]}
    assert world.befores() == [Question(" before", (CUP, PARK), HILL), Question(" before", (CUP, YARD), HILL)]


def test_the_latest_gift_counts(world: World) -> None:
    tell(world, "went ann hill", "went bob hill", "went cid hill", "got ann cup", "got bob hat")
    tell(world, "gave ann cup bob", "gave bob cup cid", "gave bob hat ann")
    givers, receivers, given = world.gifts()
    assert givers == [Question(" giver", (CUP,), BOB), Question(" giver", (HAT,), BOB)]
    assert receivers == [Question(" receiver", (CUP,), CID), Question(" receiver", (HAT,), ANN)]
    assert given == [Question(" given", (ANN,), CUP), Question(" given", (BOB,), HAT)]


def test_a_simulation_does_only_what_can_be_done(world: World) -> None:
    kinds: Counter[str] = Counter()
    for seed in range(40):
        story = World(world.people, world.places, world.objects)
        simulate(story, np.random.default_rng(seed), 15, WEIGHTS)
        again = World(world.people, world.places, world.objects)
        for marker, words in story.events:
            assert words in again.moves(marker)
            again.happen(marker, words)
        assert len(story.events) == 15
        assert again == story
        kinds.update(marker for marker, _ in story.events)
    assert set(kinds) == set(WEIGHTS)


def test_company_brings_people_together(world: World) -> None:
    def gatherings(company_frac: float) -> int:
        count = 0
        for seed in range(100):
            story = World(world.people, world.places, ())
            simulate(story, np.random.default_rng(seed), 6, {" went": 1.0}, company_frac=company_frac)
            count += len(set(story.at.values())) < len(story.at)
        return count

    assert gatherings(1.0) > gatherings(0.0) + 10


def test_a_map_is_connected_flat_and_has_one_answer_to_every_question() -> None:
    steps = {" north": (0, 1), " south": (0, -1), " east": (1, 0), " west": (-1, 0)}
    asked = {" above": (0, 1), " below": (0, -1), " right": (1, 0), " left": (-1, 0)}
    markers: Counter[str] = Counter()
    for seed in range(100):
        facts, questions = map_of(np.random.default_rng(seed), range(7))
        links = Counter(place for _, words in facts for place in words)
        assert len(facts) == 6
        assert len(questions) == len(set(questions)) == sum(count for count in links.values() if count > 1)
        cells = {0: (0, 0)}
        for _ in facts:
            for marker, (one, other) in facts:
                (dx, dy) = steps[marker]
                if other in cells:
                    cells.setdefault(one, (cells[other][0] + dx, cells[other][1] + dy))
                if one in cells:
                    cells.setdefault(other, (cells[one][0] - dx, cells[one][1] - dy))
        assert sorted(cells) == list(range(7)), "every place can be reached from every other one"
        assert len(set(cells.values())) == 7, "no two places are one"
        for marker, (one, other) in facts:
            assert np.subtract(cells[one], cells[other]).tolist() == list(steps[marker])
        assert {answer for *_, answer in questions} == set(range(7)), "every place can be an answer"
        for marker, (place,), answer in questions:
            assert links[place] > 1
            there = tuple(np.add(cells[place], asked[marker]).tolist())
            assert [other for other, cell in cells.items() if cell == there] == [answer]
        markers.update(marker for marker, _ in facts)
    assert min(markers[marker] for marker in steps) > 100


def test_answers_are_drawn_before_questions() -> None:
    """Nine questions are answered by 1, one by 2: each of the two is right half of the time."""
    kind = [Question(" where", (number,), 1) for number in range(9)] + [Question(" where", (9,), 2)]
    first = Counter(draw(np.random.default_rng(seed), [kind], 1)[0].answer for seed in range(400))
    assert 160 < first[1] < 240


def test_every_question_is_drawn_once_then_again() -> None:
    kinds = [[Question(" giver", (n,), n % 2) for n in range(3)], [Question(" given", (n,), n) for n in range(2)]]
    for seed in range(20):
        drawn = draw(np.random.default_rng(seed), kinds, 12)
        assert sorted(drawn[:5]) == sorted(drawn[5:10]) == sorted(kinds[0] + kinds[1])
        assert len(drawn) == 12
    markers = Counter(draw(np.random.default_rng(seed), kinds, 1)[0].marker for seed in range(400))
    assert 160 < markers[" giver"] < 240, "kinds are equally likely, whatever their size"
