"""A book of facts: each key has one value for good, days tell them all in order, among text."""

from __future__ import annotations

import pytest

from cortex_core.errors import ConfigError
from cortex_core.tasks.corpus import Corpus
from cortex_core.tasks.fact_book import FactBook
from cortex_core.tasks.filler import TextFiller
from cortex_core.tasks.vocabulary import TaskVocabulary


def book(vocabulary: TaskVocabulary, corpus: Corpus, facts: int = 30, seed: int = 0) -> FactBook:
    return FactBook(vocabulary, TextFiller(corpus, "held_out"), facts, seed)


def test_facts_depend_on_the_seed_alone_and_keys_are_told_apart(vocabulary: TaskVocabulary, corpus: Corpus) -> None:
    found = book(vocabulary, corpus).facts
    assert found == book(vocabulary, corpus).facts != book(vocabulary, corpus, seed=1).facts
    assert len({fact.key for fact in found}) == len(found)
    held_out = set(vocabulary.values["held_out"].tolist())
    assert {fact.value for fact in found} <= held_out and not {fact.key for fact in found} & held_out


def test_a_day_tells_its_facts_in_order_and_nothing_else_differs(vocabulary: TaskVocabulary, corpus: Corpus) -> None:
    told = book(vocabulary, corpus)
    day = told.day(2, range(4, 9), 200)
    assert len(day) == 200 and day == told.day(2, range(4, 9), 200) != told.day(3, range(4, 9), 200)
    at = -1
    for fact in told.facts[4:9]:
        line = told.told(fact)
        at = next(n for n in range(at + 1, len(day)) if day[n : n + len(line)] == line)
    assert told.question(told.facts[4])[-1] == told.facts[4].key


def test_days_that_are_too_short_and_books_that_are_too_thick(vocabulary: TaskVocabulary, corpus: Corpus) -> None:
    told = book(vocabulary, corpus)
    with pytest.raises(ConfigError, match=r"30 facts take .* tokens, a day has 16: tell fewer"):
        told.day(0, range(30), 16)
    with pytest.raises(ConfigError, match=r"num_facts = 100000 must lie in 1 to \d+"):
        book(vocabulary, corpus, facts=100_000)
