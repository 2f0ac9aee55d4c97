"""A small world of people, places and objects: what happens in it, what can be asked about it, and what is true.

The five kinds of question are the first five of bAbI (Weston et al. 2015, "Towards AI-Complete Question Answering").
People, places and objects are numbers, every one another number; `world_tasks` writes them as words.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

_NEWS_FRAC = 0.75


class Event(NamedTuple):
    """One fact: its marker, and who or what takes part."""

    marker: str
    words: tuple[int, ...]


class Question(NamedTuple):
    """A marker, what is asked about, and the one right answer."""

    marker: str
    about: tuple[int, ...]
    answer: int


@dataclass
class World:
    """Where everyone and everything is. Nothing is known of a person or object until an event tells it."""

    people: Sequence[int]
    places: Sequence[int]
    objects: Sequence[int]
    events: list[Event] = field(default_factory=list)
    at: dict[int, int] = field(default_factory=dict)
    """Place of each person that has gone anywhere, and of each object that has been picked up."""
    holder: dict[int, int] = field(default_factory=dict)
    """Person that has each object which someone has."""
    been: dict[int, list[int]] = field(default_factory=dict)
    """Places of each object in order, each one another than the one before it."""
    given: list[tuple[int, int, int]] = field(default_factory=list)
    """Giver, object and receiver of every gift, in order."""

    def moves(self, kind: str) -> list[tuple[int, ...]]:
        """The words of every event of this kind that can happen now."""
        at, holder = self.at, self.holder
        match kind:
            case " went":
                return [(who, place) for who in self.people for place in self.places if at.get(who) != place]
            case " got":
                lying = [thing for thing in self.objects if thing not in holder]
                # An object that no one has picked up yet may lie anywhere.
                return [
                    (who, thing)
                    for who in self.people
                    if who in at
                    for thing in lying
                    if at.get(thing, at[who]) == at[who]
                ]
            case " put":
                return [(who, thing) for thing, who in holder.items()]
            case _:
                return [
                    (who, thing, other)
                    for thing, who in holder.items()
                    for other in self.people
                    if other != who and at.get(other) == at[who]
                ]

    def happen(self, kind: str, words: tuple[int, ...]) -> None:
        """One more event, which must be among the `moves` of its kind."""
        self.events.append(Event(kind, words))
        who, thing = words[:2]
        match kind:
            case " went":
                self.at[who] = thing
                for held in [held for held, holder in self.holder.items() if holder == who]:
                    self._bring(held, words[1])
            case " got":
                self.holder[thing] = who
                self._bring(thing, self.at[who])
            case " put":
                del self.holder[thing]
            case _:
                self.holder[thing] = words[2]
                self.given.append((who, thing, words[2]))

    def is_news(self, kind: str, words: tuple[int, ...]) -> bool:
        """Whether the event brings someone to the story, moves or first picks up an object, or is an unlike gift."""
        match kind:
            case " went":
                return words[0] not in self.at or words[0] in self.holder.values()
            case " got":
                return words[1] not in self.at
            case " gave":
                return all(new != old for gift in self.given for new, old in zip(words, gift, strict=True))
            case _:
                return False

    def whereabouts(self) -> list[Question]:
        """One supporting fact: where is this person?"""
        return [Question(" where", (who,), self.at[who]) for who in self.people if who in self.at]

    def finds(self) -> list[Question]:
        """Two supporting facts: where is this object? Who has or dropped it, and where that person was."""
        return [Question(" find", (thing,), self.at[thing]) for thing in self.objects if thing in self.at]

    def befores(self) -> list[Question]:
        """Three supporting facts: where was this object before it came to this place, where it was only once?"""
        return [
            Question(" before", (thing, place), earlier)
            for thing, been in self.been.items()
            for earlier, place in itertools.pairwise(been)
            if been.count(place) == 1
        ]

    def gifts(self) -> tuple[list[Question], list[Question], list[Question]]:
        """Three-argument relations: who last gave this object, who last got it, and what did this person last give?"""
        by_object = {thing: (giver, receiver) for giver, thing, receiver in self.given}
        by_giver = {giver: thing for giver, thing, _ in self.given}
        return (
            [Question(" giver", (thing,), giver) for thing, (giver, _) in by_object.items()],
            [Question(" receiver", (thing,), receiver) for thing, (_, receiver) in by_object.items()],
            [Question(" given", (giver,), thing) for giver, thing in by_giver.items()],
        )

    def _bring(self, thing: int, place: int) -> None:
        self.at[thing] = place
        been = self.been.setdefault(thing, [])
        if not been or been[-1] != place:
            been.append(place)


def simulate(
    world: World, rng: np.random.Generator, num_events: int, weights: Mapping[str, float], *, company_frac: float = 0.0
) -> World:
    """Let `num_events` events happen. Of the kinds that can happen, one is drawn by weight, then who and what.

    Three times in four something new is told if it can be (`World.is_news`). With `company_frac`, so many of the ways
    lead to places where someone is already. Stories drawn without either seldom hold enough to be asked about.
    """
    for which, news, company, choice in rng.random((num_events, 4)).tolist():
        possible = [(moves, kind) for kind in weights if (moves := world.moves(kind))]
        left = which * sum(weights[kind] for _, kind in possible)
        at = 0
        while at < len(possible) - 1 and (left := left - weights[possible[at][1]]) >= 0:
            at += 1
        moves, kind = possible[at]
        if news < _NEWS_FRAC:
            moves = [words for words in moves if world.is_news(kind, words)] or moves
        if kind == " went" and company < company_frac:
            taken = {world.at[who] for who in world.people if who in world.at}
            moves = [words for words in moves if words[1] in taken] or moves
        world.happen(kind, moves[int(choice * len(moves))])
    return world


_STEPS = {" north": (0, 1), " south": (0, -1), " east": (1, 0), " west": (-1, 0)}
_OPPOSITE = {" north": " south", " south": " north", " east": " west", " west": " east"}
_ASKS = {" north": " above", " south": " below", " east": " right", " west": " left"}


def map_of(rng: np.random.Generator, places: Sequence[int]) -> tuple[list[Event], list[Question]]:
    """Two-argument relations: places on a grid, all joined by neighbours; every question has one right answer.

    " north a b" tells that a is the next place north of b. One fact for each link, told from either end, in random
    order. What is north (" above"), south, east or west of a place can be asked where the place has several neighbours:
    of a lone one the direction would not matter.
    """
    cells, facts, questions = {(0, 0): places[0]}, [], []
    for place in places[1:]:
        free = [
            (neighbour, direction, cell)
            for neighbour, (x, y) in ((neighbour, cell) for cell, neighbour in cells.items())
            for direction, (dx, dy) in _STEPS.items()
            if (cell := (x + dx, y + dy)) not in cells
        ]
        neighbour, direction, cell = free[int(rng.integers(len(free)))]
        cells[cell] = place
        back = _OPPOSITE[direction]
        facts.append(Event(direction, (place, neighbour)) if rng.random() < 0.5 else Event(back, (neighbour, place)))
        questions += [Question(_ASKS[direction], (neighbour,), place), Question(_ASKS[back], (place,), neighbour)]
    neighbours = Counter(question.about for question in questions)
    return (
        [facts[at] for at in rng.permutation(len(facts))],
        [question for question in questions if neighbours[question.about] > 1],
    )


def draw(rng: np.random.Generator, kinds: Sequence[Sequence[Question]], num_queries: int) -> list[Question]:
    """Questions in random order, each once, then each again: the kind first, then the answer, then the question.

    So, all answers of a kind are equally likely to be right, and none can be guessed by how often it is one.
    """
    drawn: list[Question] = []
    left: list[list[Question]] = []
    while len(drawn) < num_queries:
        left = [kind for kind in left if kind] or [list(kind) for kind in kinds]
        kind = left[int(rng.integers(len(left)))]
        answers = sorted({question.answer for question in kind})
        answer = answers[int(rng.integers(len(answers)))]
        fitting = [question for question in kind if question.answer == answer]
        question = fitting[int(rng.integers(len(fitting)))]
        kind.remove(question)
        drawn.append(question)
    return drawn
