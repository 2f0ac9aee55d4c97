"""Stories of a small world, one event per fact, after the first five tasks of bAbI (Weston et al. 2015).

    world_qa1  one supporting fact       " went river stone;"                       " where river" -> " stone"
    world_qa2  two supporting facts      ... " got river lamp;" " put river lamp;"  " find lamp" -> " stone"
    world_qa3  three supporting facts    ...                                        " before lamp stone" -> " hill"
    world_qa4  two-argument relations    " north stone garden;"                     " above garden" -> " stone"
    world_qa5  three-argument relations  " gave river lamp wood;"                   " giver lamp" -> " river"

People and objects are keys of the vocabulary, places values. Persons are told where they are by going there; " got" and
" put" pick up and drop an object where its person is. In qa4 stone is north of garden, and " below", " left" and
" right" ask what is south, west and east of a place. In qa5 river gave the lamp to wood; " receiver lamp" -> " wood"
and " given river" -> " lamp" are also asked, about the latest gift.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import numpy as np

from cortex_core.errors import ConfigError
from cortex_core.tasks.layout import SPLIT_CODES, Sheet, TextTask
from cortex_core.tasks.world import Event, Question, World, draw, map_of, simulate

_TRIES = 20_000
_NUM_WORDS = {" gave": 3, " before": 3}
"""Words of a line with its answer; of the other lines, two."""
_STORY_STREAM = 6


class Story(NamedTuple):
    """What is told and what can be asked, in numbers for people, objects and places, in this order."""

    events: Sequence[Event]
    kinds: Sequence[Sequence[Question]]
    """Questions by kind, each with exactly one right answer."""


@dataclass(frozen=True)
class Told(TextTask):
    """Writes stories as lines. All answers of a kind are equally likely to be right."""

    scattered: ClassVar[bool] = True
    tells: ClassVar[Iterable[str]]
    """Markers of the facts."""
    asks: ClassVar[Iterable[str]]
    """Markers of the questions."""

    @abstractmethod
    def story(self, index: int) -> Story:
        """The story of example `index`."""

    @abstractmethod
    def size(self) -> tuple[int, int, int]:
        """People and objects together, places, and facts of every story."""

    def max_overhead_tokens(self, *, num_queries: int = 1) -> int:
        """As if every fact and every question were the longest one there is."""
        facts, questions = self._longest_line(self.tells), self._longest_line(self.asks)
        return len(self.vocabulary.prefix) + self.size()[2] * facts + num_queries * questions

    def sheet(self, index: int, num_queries: int) -> Sheet:
        rng = self.rng(index)
        keys, places = self.words(index, rng, *self.size()[:2])
        names, story = [*keys, *places], self.story(index)
        return Sheet(
            facts=[self.line(marker, [names[word] for word in words]) for marker, words in story.events],
            queries=[
                self.line(marker, [names[word] for word in (*about, answer)], num_answers=1)
                for marker, about, answer in draw(rng, story.kinds, num_queries)
            ],
        )

    def _longest_line(self, markers: Iterable[str]) -> int:
        pieces = self.vocabulary.pieces
        return max(len(pieces[marker]) + _NUM_WORDS.get(marker, 2) for marker in markers) + len(pieces[";"])


@dataclass(frozen=True)
class WorldTask(Told):
    """Events that change the world.

    A story is drawn until its questions of every kind have at least `num_answers` different answers: whoever knows the
    story but not the question is right once in `num_answers`.
    """

    tells: ClassVar[Mapping[str, float]]
    """How likely events of each kind are, where they can happen."""
    company_frac: ClassVar[float] = 0.0
    """Share of the ways that lead to where someone is already."""

    num_people: int = 4
    num_places: int = 6
    num_objects: int = 3
    num_events: int = 10

    def __post_init__(self) -> None:
        """Raises ConfigError when a number is too small for a question to be one, or words are too few."""
        for name, least in (("num_people", 2), ("num_places", 3), ("num_objects", 2), ("num_events", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} = {getattr(self, name)} must be at least {least}")
        self.check_words(*self.size()[:2])

    @property
    @abstractmethod
    def num_answers(self) -> int:
        """Different answers that the questions of one kind have at least."""

    @staticmethod
    @abstractmethod
    def kinds(world: World) -> Sequence[Sequence[Question]]:
        """What can be asked about the world as it is now, by kind."""

    def chance(self) -> float:
        """A guess is one of the answers that questions of this kind have in the story."""
        return 1 / self.num_answers

    def size(self) -> tuple[int, int, int]:
        return self.num_people + self.num_objects, self.num_places, self.num_events

    def story(self, index: int) -> Story:
        """Raises ConfigError when so few events never tell enough."""
        numbers = (self.num_people, self.num_objects, self.num_places, self.num_events)
        found = _first_story(type(self), numbers, self.num_answers, (self.seed, SPLIT_CODES[self.split], index))
        if found is None:
            raise ConfigError(
                f"num_events = {self.num_events} tell too little for {self.num_answers} different answers of "
                f"{self.name}: raise num_events, or lower num_people and num_objects"
            )
        return found


@lru_cache(maxsize=8192)
def _first_story(
    task: type[WorldTask], numbers: tuple[int, int, int, int], num_answers: int, seed: tuple[int, ...]
) -> Story | None:
    """The first of many stories whose answers are different enough. Kept: examples are asked at many gaps."""
    people, objects, places, num_events = numbers
    rng = np.random.default_rng([*seed, _STORY_STREAM])
    everyone = range(people + objects + places)
    for _ in range(_TRIES):
        world = World(everyone[:people], everyone[people + objects :], everyone[people : people + objects])
        simulate(world, rng, num_events, task.tells, company_frac=task.company_frac)
        kinds = task.kinds(world)
        if all(len({question.answer for question in kind}) >= num_answers for kind in kinds):
            return Story(tuple(world.events), tuple(tuple(kind) for kind in kinds))
    return None


@dataclass(frozen=True)
class WorldQA1(WorldTask):
    """Where is this person? People do nothing but go from place to place."""

    name: ClassVar[str] = "world_qa1"
    tells: ClassVar[Mapping[str, float]] = MappingProxyType({" went": 1.0})
    asks: ClassVar[Iterable[str]] = (" where",)

    @property
    def num_answers(self) -> int:
        """At the end everyone is somewhere else, as far as there are places."""
        return min(self.num_people, self.num_places - 1)

    @staticmethod
    def kinds(world: World) -> Sequence[Sequence[Question]]:
        return (world.whereabouts(),)


@dataclass(frozen=True)
class WorldQA2(WorldTask):
    """Where is this object? Its place is that of the person who has it, or was that of the person who dropped it."""

    name: ClassVar[str] = "world_qa2"
    tells: ClassVar[Mapping[str, float]] = MappingProxyType({" went": 1.5, " got": 1.0, " put": 0.7})
    asks: ClassVar[Iterable[str]] = (" find",)

    @property
    def num_answers(self) -> int:
        """At the end all objects are at different places, as far as there are places."""
        return min(self.num_objects, self.num_places - 1)

    @staticmethod
    def kinds(world: World) -> Sequence[Sequence[Question]]:
        return (world.finds(),)


@dataclass(frozen=True)
class WorldQA3(WorldTask):
    """Where was this object before it came to this place?"""

    name: ClassVar[str] = "world_qa3"
    tells: ClassVar[Mapping[str, float]] = MappingProxyType({" went": 2.0, " got": 1.0, " put": 0.3})
    asks: ClassVar[Iterable[str]] = (" before",)

    num_events: int = 12

    @property
    def num_answers(self) -> int:
        """Objects have come from so many different places."""
        return min(4, self.num_places - 1)

    @staticmethod
    def kinds(world: World) -> Sequence[Sequence[Question]]:
        return (world.befores(),)


@dataclass(frozen=True)
class WorldQA4(Told):
    """What is north, south, east or west of this place? Neighbours on a map, told from either end."""

    name: ClassVar[str] = "world_qa4"
    tells: ClassVar[Iterable[str]] = (" north", " south", " east", " west")
    asks: ClassVar[Iterable[str]] = (" above", " below", " left", " right")

    num_places: int = 6

    def __post_init__(self) -> None:
        """Raises ConfigError for a map that asks nothing, or when words are too few."""
        if self.num_places < 3:
            raise ConfigError(f"num_places = {self.num_places} must be at least 3")
        self.check_words(0, self.num_places)

    def chance(self) -> float:
        """A guess is any place but the one that is asked about."""
        return 1 / (self.num_places - 1)

    def size(self) -> tuple[int, int, int]:
        return 0, self.num_places, self.num_places - 1

    def story(self, index: int) -> Story:
        events, questions = map_of(self.rng(index, _STORY_STREAM), range(self.num_places))
        return Story(events, [questions])


@dataclass(frozen=True)
class WorldQA5(WorldTask):
    """Who gave this object, who got it, and what did this person give, the last time?"""

    name: ClassVar[str] = "world_qa5"
    tells: ClassVar[Mapping[str, float]] = MappingProxyType({" went": 1.0, " got": 2.0, " put": 0.2, " gave": 2.0})
    asks: ClassVar[Iterable[str]] = (" giver", " receiver", " given")
    company_frac: ClassVar[float] = 0.9

    num_events: int = 12

    @property
    def num_answers(self) -> int:
        """All objects were last given by, and to, different people, as far as there are people."""
        return min(self.num_objects, self.num_people - 1)

    @staticmethod
    def kinds(world: World) -> Sequence[Sequence[Question]]:
        return world.gifts()
