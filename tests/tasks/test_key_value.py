from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from cortex_core.errors import ConfigError
from cortex_core.tasks.corpus import Corpus
from cortex_core.tasks.filler import RandomFiller
from cortex_core.tasks.key_value import KeyValue
from cortex_core.tasks.vocabulary import TaskVocabulary


@pytest.fixture
def task(vocabulary: TaskVocabulary) -> KeyValue:
    return KeyValue(vocabulary, RandomFiller(vocabulary), "held_out", 0, 4)


def words(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> list[str]:
    return [tokenizer.decode([token]).strip() for token in tokens]


def test_lines_read_as_text(task: KeyValue, tokenizer: PreTrainedTokenizerBase) -> None:
    sheet = task.sheet(7, 4)
    for part in sheet.facts:
        _, key, value, _ = words(tokenizer, part.tokens)
        assert part.tokens == tokenizer.encode(f" remember {key} {value};", add_special_tokens=False)
    for part in sheet.queries:
        _, key, value, _ = words(tokenizer, part.tokens)
        assert part.tokens == tokenizer.encode(f" recall {key} {value};", add_special_tokens=False)


def test_answer_is_the_value_that_the_key_was_given(task: KeyValue, tokenizer: PreTrainedTokenizerBase) -> None:
    for index in range(20):
        given = {part.tokens[1]: part.tokens[2] for part in task.sheet(index, 1).facts}
        assert len(given) == 4, "keys are distinct"
        example = task.example(index, 11, num_queries=3)
        tokens = example.tokens.tolist()
        asked = [position for position, answer in enumerate(example.answer) if answer]
        assert len(asked) == 3
        assert all(given[tokens[position - 1]] == tokens[position] for position in asked)


def test_every_key_is_asked_before_any_is_asked_again(task: KeyValue) -> None:
    orders = set()
    for index in range(10):
        asked = [part.tokens[1] for part in task.sheet(index, 10).queries]
        facts = [part.tokens[1] for part in task.sheet(index, 10).facts]
        assert sorted(asked[:4]) == sorted(asked[4:8]) == sorted(facts)
        assert len(set(asked[8:])) == 2
        orders.add(tuple(facts.index(key) for key in asked[:4]))
    assert len(orders) > 4


def test_words_come_from_the_pools_of_the_split(vocabulary: TaskVocabulary) -> None:
    for split, other in (("train", "held_out"), ("held_out", "train")):
        task = KeyValue(vocabulary, RandomFiller(vocabulary), split, 0, 4)
        facts = [part.tokens for index in range(50) for part in task.sheet(index, 1).facts]
        keys, values = {fact[1] for fact in facts}, {fact[2] for fact in facts}
        assert keys <= set(vocabulary.keys[split])
        assert values <= set(vocabulary.values[split])
        assert not (keys | values) & {*vocabulary.keys[other], *vocabulary.values[other]}


def test_gap_and_number_of_questions_leave_the_facts_alone(task: KeyValue) -> None:
    assert task.sheet(3, 1).facts == task.sheet(3, 9).facts
    assert task.example(3, 0).tokens[:16].tolist() == task.example(3, 999).tokens[:16].tolist()


def test_any_token_may_be_a_key_but_never_a_held_out_word(vocabulary: TaskVocabulary) -> None:
    def told(any_token_frac: float) -> list[set[int]]:
        task = KeyValue(vocabulary, RandomFiller(vocabulary), "train", 0, 4, any_token_frac=any_token_frac)
        return [{word for part in task.sheet(i, 1).facts for word in part.tokens[1:3]} for i in range(200)]

    words = {*vocabulary.keys["train"].tolist(), *vocabulary.values["train"].tolist()}
    mixed = told(0.5)
    beyond = sum(not example <= words for example in mixed)
    assert 40 < beyond < 160, "about half of the examples"
    assert not set().union(*mixed) & set(vocabulary.held_out_words().tolist())
    assert all(example <= words for example in told(0.0))


def test_more_pairs_than_keys_is_refused(vocabulary: TaskVocabulary, corpus: Corpus) -> None:
    keys = len(vocabulary.keys["held_out"])
    with pytest.raises(ConfigError, match=f"num_pairs = {keys + 1} must lie in 1 to {keys}: .*held-out keys"):
        KeyValue(vocabulary, RandomFiller(vocabulary), "held_out", 0, keys + 1)
