from __future__ import annotations

from collections import defaultdict
from typing import Literal

import pytest
from transformers import PreTrainedTokenizerBase

from cortex_core.errors import ConfigError
from cortex_core.tasks.corpus import Corpus
from cortex_core.tasks.filler import RandomFiller
from cortex_core.tasks.mixture import build_task
from cortex_core.tasks.needle import MultiQueryNeedle, Needle
from cortex_core.tasks.vocabulary import TaskVocabulary

Kind = Literal["needle_single", "needle_multi_key", "needle_multi_value", "needle_multi_query"]
SIZES: dict[Kind, tuple[int, int, int]] = {
    "needle_single": (1, 1, 1), "needle_multi_key": (8, 1, 1), "needle_multi_value": (1, 4, 1),
    "needle_multi_query": (8, 1, 4),
}  # fmt: skip
"""Keys, values per key, and keys asked."""


@pytest.mark.parametrize("name", SIZES)
def test_a_key_is_answered_with_all_its_values_in_the_order_of_telling(
    name: Kind, vocabulary: TaskVocabulary, corpus: Corpus, tokenizer: PreTrainedTokenizerBase
) -> None:
    task = build_task(name, "random", vocabulary, corpus, split="held_out")
    keys, values, asked = SIZES[name]
    remember, recall, end = (vocabulary.pieces[marker][0] for marker in (" remember", " recall", ";"))
    for index in range(20):
        facts, queries = task.sheet(index, 1)
        told = defaultdict(list)
        for fact in facts:
            marker, key, value, last = fact.tokens
            assert (marker, last, fact.answer_from) == (remember, end, -1)
            told[key].append(value)
        assert [len(told), *{len(each) for each in told.values()}] == [keys, values]
        assert len({token for each in told.values() for token in each}) == keys * values
        assert len(queries) == len({query.tokens[1] for query in queries}) == asked
        for query in queries:
            assert query.tokens == [recall, query.tokens[1], *told[query.tokens[1]], end]
            assert (query.answer_from, query.answer_to) == (2, 2 + values)
    assert task.example(0, 50).answer.sum() == asked * values
    assert task.scattered


def test_keys_of_several_values_are_told_in_turns(vocabulary: TaskVocabulary) -> None:
    task = Needle(vocabulary, RandomFiller(vocabulary), "train", 0, 3, 3)
    orders = {tuple(part.tokens[1] for part in task.sheet(index, 1).facts) for index in range(30)}
    assert sum(len(set(order[:3])) > 1 for order in orders) > 20


def test_more_questions_ask_for_more_keys_and_for_none_twice(vocabulary: TaskVocabulary) -> None:
    task = MultiQueryNeedle(vocabulary, RandomFiller(vocabulary))
    for num_queries, asked in ((1, 4), (6, 6), (20, 8)):
        found = [query.tokens[1] for query in task.sheet(2, num_queries).queries]
        assert len(found) == len(set(found)) == asked
    assert task.sheet(2, 1).facts == task.sheet(2, 20).facts


def test_what_cannot_be_asked_is_refused(vocabulary: TaskVocabulary) -> None:
    def needle(*sizes: int) -> Needle:
        return Needle(vocabulary, RandomFiller(vocabulary), "held_out", 0, *sizes)

    with pytest.raises(ConfigError, match="num_values = 0 must be at least 1"):
        needle(1, 0, 1)
    with pytest.raises(ConfigError, match="num_asked = 3 must be at most num_keys = 2"):
        needle(2, 1, 3)
    values = len(vocabulary.values["held_out"])
    with pytest.raises(
        ConfigError, match=f"needle_single needs {values + 1} values, and this tokenizer offers {values}"
    ):
        needle(1, values + 1, 1)
