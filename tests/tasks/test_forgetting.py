from __future__ import annotations

from collections import Counter

import pytest

from cortex_core.errors import ConfigError
from cortex_core.tasks.filler import RandomFiller
from cortex_core.tasks.forgetting import Forgetting
from cortex_core.tasks.vocabulary import TaskVocabulary


@pytest.fixture
def task(vocabulary: TaskVocabulary) -> Forgetting:
    return Forgetting(vocabulary, RandomFiller(vocabulary), "held_out", 0, 4)


def told(task: Forgetting, index: int) -> list[tuple[int, int]]:
    remember = task.vocabulary.pieces[" remember"][0]
    facts = [part.tokens for part in task.sheet(index, 1).facts]
    assert all(fact[0] == remember and len(fact) == 4 for fact in facts)
    return [(fact[1], fact[2]) for fact in facts]


def test_the_latest_value_is_the_answer(task: Forgetting) -> None:
    stale = 0
    for index in range(40):
        latest = dict(told(task, index))
        first = dict(reversed(told(task, index)))
        for query in task.sheet(index, 4).queries:
            key, value = query.tokens[1:3]
            assert query.tokens[0] == task.vocabulary.pieces[" recall"][0]
            assert latest[key] == value
            stale += first[key] != value
        assert sorted(query.tokens[1] for query in task.sheet(index, 4).queries) == sorted(latest)
    assert stale > 60, "or the first value would do"


def test_keys_are_told_one_to_three_times_in_random_order(task: Forgetting) -> None:
    times: Counter[int] = Counter()
    interleaved = 0
    for index in range(60):
        facts = told(task, index)
        counts = Counter(key for key, _ in facts)
        assert (len(facts), len(counts)) == (8, 4)
        times.update(counts.values())
        assert len(set(facts)) == 8, "another value each time"
        places = [[at for at, (key, _) in enumerate(facts) if key == one] for one in counts]
        interleaved += any(there[-1] - there[0] >= len(there) for there in places)
    assert set(times) == {1, 2, 3}
    assert min(times.values()) > 40
    assert interleaved > 50


def test_neither_the_last_fact_nor_a_key_told_often_is_asked_more(task: Forgetting) -> None:
    last, often = 0, 0
    for index in range(400):
        facts, asked = told(task, index), task.sheet(index, 1).queries[0].tokens[1]
        last += facts[-1][0] == asked
        often += sum(key == asked for key, _ in facts)
    assert 0.18 < last / 400 < 0.32
    assert often / 400 == pytest.approx(2, abs=0.12)


def test_it_takes_two_keys_and_three_values(vocabulary: TaskVocabulary) -> None:
    with pytest.raises(ConfigError, match="num_pairs = 1 must be at least 2"):
        Forgetting(vocabulary, RandomFiller(vocabulary), "held_out", 0, 1)
    keys = len(vocabulary.keys["held_out"])
    with pytest.raises(ConfigError, match=f"num_pairs = {keys + 1} must lie in 1 to {keys}"):
        Forgetting(vocabulary, RandomFiller(vocabulary), "held_out", 0, keys + 1)
