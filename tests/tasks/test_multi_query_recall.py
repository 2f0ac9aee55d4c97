from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from cortex_core.errors import ConfigError
from cortex_core.tasks.filler import RandomFiller
from cortex_core.tasks.multi_query_recall import MultiQueryRecall
from cortex_core.tasks.vocabulary import TaskVocabulary


def test_pairs_stand_in_one_line_and_a_key_is_answered_with_what_followed_it(
    vocabulary: TaskVocabulary, tokenizer: PreTrainedTokenizerBase
) -> None:
    task = MultiQueryRecall(vocabulary, RandomFiller(vocabulary), "held_out", 0, 5)
    for index in range(20):
        (fact,), queries = task.sheet(index, 7)
        words = [tokenizer.decode([token]).strip() for token in fact.tokens[1:-1]]
        assert fact.tokens == tokenizer.encode(f" pairs {' '.join(words)};", add_special_tokens=False)
        assert len(words) == len(set(words)) == 10
        assert set(fact.tokens[1:-1:2]) <= set(vocabulary.keys["held_out"])
        assert set(fact.tokens[2:-1:2]) <= set(vocabulary.values["held_out"])
        follows = dict(zip(words[::2], words[1::2], strict=True))
        asked = []
        for query in queries:
            _, key, value, _ = (tokenizer.decode([token]).strip() for token in query.tokens)
            assert query.tokens == tokenizer.encode(f" pair {key} {value};", add_special_tokens=False)
            assert (query.answer_from, query.answer_to) == (2, 3)
            assert follows[key] == value
            asked.append(key)
        assert sorted(asked[:5]) == sorted(follows), "each is asked once, then again"


def test_a_default_example_takes_19_tokens(bpe: PreTrainedTokenizerBase) -> None:
    vocabulary = TaskVocabulary.from_tokenizer(bpe)
    assert MultiQueryRecall(vocabulary, RandomFiller(vocabulary)).overhead_tokens(0) == 1 + 14 + 4


def test_any_tokens_still_make_every_word_another_one(vocabulary: TaskVocabulary) -> None:
    task = MultiQueryRecall(vocabulary, RandomFiller(vocabulary), "train", 0, 12, any_token_frac=1.0)
    for index in range(100):
        assert len(set(task.sheet(index, 1).facts[0].tokens[1:-1])) == 24


def test_too_many_or_no_pairs_are_refused(vocabulary: TaskVocabulary) -> None:
    keys = len(vocabulary.keys["held_out"])
    with pytest.raises(
        ConfigError, match=rf"multi_query_recall needs {keys + 1} keys, and .* offers {keys} held-out keys"
    ):
        MultiQueryRecall(vocabulary, RandomFiller(vocabulary), "held_out", 0, keys + 1)
    with pytest.raises(ConfigError, match="num_pairs = 0 must be at least 1"):
        MultiQueryRecall(vocabulary, RandomFiller(vocabulary), "held_out", 0, 0)
