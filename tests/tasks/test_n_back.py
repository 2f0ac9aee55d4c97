from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from cortex_core.errors import ConfigError
from cortex_core.tasks.filler import RandomFiller
from cortex_core.tasks.n_back import NBack
from cortex_core.tasks.vocabulary import TaskVocabulary


@pytest.fixture
def task(bpe: PreTrainedTokenizerBase) -> NBack:
    vocabulary = TaskVocabulary.from_tokenizer(bpe)
    return NBack(vocabulary, RandomFiller(vocabulary), "train", 0)


def test_answer_counts_from_the_end(task: NBack, bpe: PreTrainedTokenizerBase) -> None:
    asked = set()
    for index in range(20):
        items = bpe.decode(task.sheet(index, 1).facts[0].tokens).removeprefix(" items ").removesuffix(";").split()
        assert len(set(items)) == 8
        marker, back, answer = bpe.decode(task.sheet(index, 1).queries[0].tokens).removesuffix(";").split()
        assert marker == "item"
        assert answer == items[-int(back)]
        asked.add(int(back))
    assert asked == set(range(1, 9))


def test_eight_questions_ask_for_every_item(task: NBack) -> None:
    example = task.example(0, 3, num_queries=8)
    fact = task.sheet(0, 8).facts[0].tokens
    assert sorted(example.tokens[example.answer]) == sorted(fact[1:9])


def test_more_items_than_one_digit_counts_is_refused(task: NBack) -> None:
    with pytest.raises(ConfigError, match="num_items = 10 must lie in 1 to 9"):
        NBack(task.vocabulary, task.filler, num_items=10)
