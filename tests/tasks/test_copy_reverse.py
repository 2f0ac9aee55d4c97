from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from cortex_core.errors import ConfigError
from cortex_core.tasks.copy_reverse import CopyReverse
from cortex_core.tasks.filler import RandomFiller
from cortex_core.tasks.vocabulary import TaskVocabulary


def test_answer_is_the_digits_backwards(bpe: PreTrainedTokenizerBase) -> None:
    vocabulary = TaskVocabulary.from_tokenizer(bpe)
    task = CopyReverse(vocabulary, RandomFiller(vocabulary), "held_out", 0, index_hints=False)
    seen = set()
    for index in range(20):
        example = task.example(index, 5)
        fact = bpe.decode(task.sheet(index, 1).facts[0].tokens)
        assert fact.startswith(" digits ")
        digits = fact.removeprefix(" digits ").removesuffix(";").split()
        assert len(digits) == 12
        assert bpe.decode(example.tokens[example.answer]).split() == digits[::-1]
        assert bpe.decode(example.tokens).endswith(f" reverse {' '.join(digits[::-1])};")
        seen.add(tuple(digits))
    assert len(seen) == 20


def test_hints_name_the_positions_in_both_directions(bpe: PreTrainedTokenizerBase) -> None:
    vocabulary = TaskVocabulary.from_tokenizer(bpe)
    task = CopyReverse(vocabulary, RandomFiller(vocabulary), "held_out")
    plain = CopyReverse(vocabulary, RandomFiller(vocabulary), "held_out", index_hints=False)
    for index in range(20):
        digits = bpe.decode(plain.sheet(index, 1).facts[0].tokens).removeprefix(" digits ").removesuffix(";").split()
        hinted = [f"{letter} {digit}" for letter, digit in zip("abcdefghijkl", digits, strict=True)]
        (fact,), (query,) = task.sheet(index, 1)
        assert bpe.decode(fact.tokens) == f" digits {' '.join(hinted)};"
        assert bpe.decode(query.tokens) == f" reverse {' '.join(reversed(hinted))};"
        assert bpe.decode(query.tokens[query.answer_from : query.answer_to]) == f" {' '.join(reversed(hinted))}"
    assert (task.query_tokens(0), task.overhead_tokens(0)) == (26, 53)


def test_there_are_33_hints(bpe: PreTrainedTokenizerBase) -> None:
    vocabulary = TaskVocabulary.from_tokenizer(bpe)
    longest = CopyReverse(vocabulary, RandomFiller(vocabulary), num_digits=33)
    assert bpe.decode(longest.sheet(0, 1).queries[0].tokens).startswith(" reverse G ")
    with pytest.raises(ConfigError, match="num_digits = 34 must lie in 1 to 33 with index hints"):
        CopyReverse(vocabulary, RandomFiller(vocabulary), num_digits=34)
    CopyReverse(vocabulary, RandomFiller(vocabulary), num_digits=34, index_hints=False)


@pytest.mark.parametrize(("index_hints", "asked"), [(True, 24), (False, 12)])
def test_it_is_asked_once(bpe: PreTrainedTokenizerBase, index_hints: bool, asked: int) -> None:
    vocabulary = TaskVocabulary.from_tokenizer(bpe)
    task = CopyReverse(vocabulary, RandomFiller(vocabulary), index_hints=index_hints)
    assert task.example(0, 5, num_queries=6).answer.sum() == asked
