from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from cortex_core.errors import ConfigError
from cortex_core.tasks.filler import RandomFiller
from cortex_core.tasks.n_back import NBack
from cortex_core.tasks.vocabulary import TaskVocabulary


@pytest.fixture(params=[True, False], ids=["hints", "plain"])
def task(request: pytest.FixtureRequest, bpe: PreTrainedTokenizerBase) -> NBack:
    vocabulary = TaskVocabulary.from_tokenizer(bpe)
    return NBack(vocabulary, RandomFiller(vocabulary), "train", 0, index_hints=request.param)


def test_answer_counts_from_the_end(task: NBack, bpe: PreTrainedTokenizerBase) -> None:
    asked = set()
    for index in range(20):
        told = bpe.decode(task.sheet(index, 1).facts[0].tokens).removeprefix(" items ").removesuffix(";").split()
        if task.index_hints:
            assert "".join(told[::2]) == "hgfedcba", "the last item is a"
        items = told[1::2] if task.index_hints else told
        assert len(items) == len(set(items)) == 8
        marker, back, answer = bpe.decode(task.sheet(index, 1).queries[0].tokens).removesuffix(";").split()
        assert marker == "item"
        distance = "abcdefgh".index(back) + 1 if task.index_hints else int(back)
        assert answer == items[-distance]
        asked.add(distance)
    assert asked == set(range(1, 9))


def test_both_forms_ask_for_the_same_words(task: NBack) -> None:
    other = NBack(task.vocabulary, task.filler, "train", 0, index_hints=not task.index_hints)
    for index in range(10):
        one, two = task.example(index, 3, num_queries=4), other.example(index, 3, num_queries=4)
        assert one.tokens[one.answer].tolist() == two.tokens[two.answer].tolist()


def test_eight_questions_ask_for_every_item(task: NBack) -> None:
    example = task.example(0, 3, num_queries=8)
    fact = task.sheet(0, 8).facts[0].tokens
    assert sorted(example.tokens[example.answer]) == sorted(fact[2:18:2] if task.index_hints else fact[1:9])


def test_more_items_than_can_be_named_are_refused(task: NBack) -> None:
    with pytest.raises(ConfigError, match="num_items = 10 must lie in 1 to 9"):
        NBack(task.vocabulary, task.filler, num_items=10, index_hints=False)
    words = len(task.vocabulary.values["train"])
    assert (
        NBack(task.vocabulary, task.filler, num_items=10).sheet(0, 1).facts[0].tokens[1]
        == task.vocabulary.pieces[" j"][0]
    )
    with pytest.raises(ConfigError, match=f"num_items = 34 must lie in 1 to {min(words, 33)}"):
        NBack(task.vocabulary, task.filler, num_items=34)
