"""Every answer is checked by a reader that knows nothing but the lines as text, and guessing is shown not to pay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from cortex_core.errors import ConfigError
from cortex_core.tasks.filler import RandomFiller
from cortex_core.tasks.mixture import build_task
from cortex_core.tasks.vocabulary import TaskVocabulary
from cortex_core.tasks.world_tasks import Told, WorldQA1, WorldQA2, WorldQA3, WorldQA4, WorldQA5
from tests import tiny

Name = Literal["world_qa1", "world_qa2", "world_qa3", "world_qa4", "world_qa5"]
NAMES: tuple[Name, ...] = ("world_qa1", "world_qa2", "world_qa3", "world_qa4", "world_qa5")
Lines = list[list[str]]


def told(task: Told, index: int, num_queries: int = 1) -> tuple[Lines, Lines]:
    """Facts and questions as words; the last word of a question is its answer."""
    read = task.vocabulary.tokenizer.decode
    facts, queries = task.sheet(index, num_queries)
    assert all(query.answer_to - query.answer_from == 1 for query in queries)
    return tuple([read(part.tokens).removesuffix(";").split() for part in parts] for parts in (facts, queries))


@pytest.fixture(params=NAMES)
def task(request: pytest.FixtureRequest) -> Told:
    return build_task(request.param, "random", tiny.vocabulary(), tiny.corpus(), split="held_out", seed=2)


def follow(facts: Lines) -> Callable[[list[str]], list[str]]:
    """Plays the events through, checking that each can happen, and returns what answers a question."""
    place, holder, lies = {}, {}, {}
    trail: dict[str, list[str]] = {}
    gifts: Lines = []
    for verb, who, *rest in facts:
        if verb == "went":
            assert place.get(who) != rest[0]
            place[who] = rest[0]
        elif verb == "got":
            assert rest[0] not in holder and lies.pop(rest[0], place[who]) == place[who]
            holder[rest[0]] = who
        else:
            assert holder.pop(rest[0]) == who
            if verb == "put":
                lies[rest[0]] = place[who]
            else:
                assert verb == "gave" and place[rest[1]] == place[who] and rest[1] != who
                holder[rest[0]] = rest[1]
                gifts.append([who, *rest])
        for thing, someone in holder.items():
            seen = trail.setdefault(thing, [])
            if seen[-1:] != [place[someone]]:
                seen.append(place[someone])

    def answers(question: list[str]) -> list[str]:
        match question:
            case ["where", who]:
                return [place[who]]
            case ["find", thing]:
                return [place[holder[thing]] if thing in holder else lies[thing]]
            case ["before", thing, where]:
                return [trail[thing][at - 1] for at, seen in enumerate(trail[thing]) if seen == where and at]
            case ["giver", thing]:
                return [gift[0] for gift in gifts if gift[1] == thing][-1:]
            case ["receiver", thing]:
                return [gift[2] for gift in gifts if gift[1] == thing][-1:]
            case ["given", who]:
                return [gift[1] for gift in gifts if gift[0] == who][-1:]
        raise AssertionError(question)

    return answers


def look(facts: Lines) -> Callable[[list[str]], list[str]]:
    """Reads a map: what was told to be the neighbour on this side, from either end."""
    ways = {
        "above": ("north", "south"),
        "below": ("south", "north"),
        "right": ("east", "west"),
        "left": ("west", "east"),
    }

    def answers(question: list[str]) -> list[str]:
        side, place = question
        there, back = ways[side]
        return [one for way, one, other in facts if (way, other) == (there, place)] + [
            other for way, one, other in facts if (way, one) == (back, place)
        ]

    return answers


def test_every_question_has_the_one_answer_that_it_is_given(task: Told) -> None:
    markers = set()
    for index in range(60):
        facts, queries = told(task, index, 6)
        answers = look(facts) if task.name == "world_qa4" else follow(facts)
        assert len(queries) == 6
        for *question, answer in queries:
            assert answers(question) == [answer]
            markers.add(f" {question[0]}")
    assert markers == set(task.asks), "all kinds of question are asked"


def test_facts_are_lines_of_the_kinds_that_the_task_tells(task: Told) -> None:
    seen: Counter[str] = Counter()
    for index in range(40):
        sheet = task.sheet(index, 1)
        assert len(sheet.facts) == task.size()[2]
        seen.update(f" {fact[0]}" for fact in told(task, index)[0])
        words = {token for part in sheet.facts for token in part.tokens[1:-1]}
        keys, values = task.vocabulary.keys["held_out"], task.vocabulary.values["held_out"]
        assert words <= {*keys.tolist(), *values.tolist()}
        assert len(words & set(keys.tolist())) <= task.size()[0]
        assert len(words & set(values.tolist())) <= task.size()[1]
    assert set(seen) == set(task.tells)
    assert task.scattered


def test_lengths_of_default_examples(task: Told) -> None:
    most = {"world_qa1": 45, "world_qa2": 45, "world_qa3": 54, "world_qa4": 25, "world_qa5": 65}
    assert task.max_overhead_tokens() == most[task.name]
    lengths = [task.overhead_tokens(index) for index in range(50)]
    assert max(lengths) <= most[task.name]
    assert task.name == "world_qa5" or set(lengths) == {most[task.name]}


def guesses(facts: Lines, candidates: set[str]) -> dict[str, str]:
    """What someone would say who saw the words but did not put any two of them together."""
    words = [word for fact in facts for word in fact[1:] if word in candidates]
    often = Counter(words)
    return {
        "first": words[0], "last": words[-1], "often": often.most_common(1)[0][0], "seldom": often.most_common()[-1][0],
    }  # fmt: skip


def test_guessing_does_not_beat_chance(task: Told) -> None:
    """Of 600 examples, chance would be exceeded by 0.06 about once in a thousand times (at a chance of 1/3)."""
    right: Counter[str] = Counter()
    people, places, _ = task.size()
    for index in range(600):
        facts, ((*_, answer),) = told(task, index)
        names = {word for fact in facts for word in fact[1:]}
        pool = task.vocabulary.values if task.name != "world_qa5" else task.vocabulary.keys
        candidates = names & {task.vocabulary.tokenizer.decode([int(t)]).strip() for t in pool["held_out"]}
        right.update(kind for kind, guess in guesses(facts, candidates).items() if guess == answer)
    assert max(right.values()) / 600 < task.chance() + 0.06, right
    assert people + places > 5


def test_whoever_knows_the_story_but_not_the_question_is_right_at_most_by_chance() -> None:
    """All answers of a kind are equally likely, so the number of different ones is what counts."""
    for name in ("world_qa1", "world_qa2", "world_qa3", "world_qa5"):
        task = build_task(name, "random", tiny.vocabulary(), tiny.corpus(), split="train", seed=2)
        assert isinstance(task, Told)
        for index in range(40):
            _, kinds = task.story(index)
            assert all(len({question.answer for question in kind}) >= round(1 / task.chance()) for kind in kinds)


def test_what_is_asked_about_may_be_told_early_or_late(task: Told) -> None:
    """Not only in the last facts, where the window would still hold it."""
    places = []
    for index in range(200):
        facts, ((_, asked, *_),) = told(task, index)
        latest = max(at for at, fact in enumerate(facts) if asked in fact[1:])
        places.append(latest / (len(facts) - 1))
    assert np.quantile(places, 0.1) < 0.7
    assert max(places) == 1.0


def test_seed_split_and_index_decide_the_story(task: Told) -> None:
    like = (task.vocabulary, task.filler)
    assert type(task)(*like, "held_out", 2).sheet(3, 2) == task.sheet(3, 2)
    assert task.sheet(3, 1).facts == task.sheet(3, 5).facts
    for split, seed, index in (("held_out", 3, 3), ("held_out", 2, 4), ("train", 2, 3)):
        assert type(task)(*like, split, seed).sheet(index, 1) != task.sheet(3, 1)


def test_other_sizes(bpe: PreTrainedTokenizerBase) -> None:
    vocabulary = TaskVocabulary.from_tokenizer(bpe)
    like = (vocabulary, RandomFiller(vocabulary), "train", 0)
    for small in (
        WorldQA1(*like, num_people=2, num_places=3, num_events=4), WorldQA2(*like, 2, 3, 2, 8), WorldQA3(*like, 2, 4, 2),
        WorldQA4(*like, 12), WorldQA5(*like, num_people=3, num_objects=2),
    ):  # fmt: skip
        for index in range(10):
            facts, queries = told(small, index, 4)
            answers = look(facts) if small.name == "world_qa4" else follow(facts)
            assert all(answers(question) == [answer] for *question, answer in queries)


def test_what_cannot_be_asked_is_refused(bpe: PreTrainedTokenizerBase) -> None:
    vocabulary = TaskVocabulary.from_tokenizer(bpe)
    like = (vocabulary, RandomFiller(vocabulary), "held_out", 0)
    for make, complaint in (
        (lambda: WorldQA1(*like, num_people=1), "num_people = 1 must be at least 2"),
        (lambda: WorldQA2(*like, num_objects=1), "num_objects = 1 must be at least 2"),
        (lambda: WorldQA4(*like, 2), "num_places = 2 must be at least 3"),
        (lambda: WorldQA5(*like, num_people=50), "world_qa5 needs 53 keys"),
        (lambda: WorldQA4(*like, 50), "world_qa4 needs 50 values"),
        (lambda: WorldQA1(*like, num_events=3).sheet(0, 1), "num_events = 3 tell too little for 4 different answers"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=complaint):
            make()
