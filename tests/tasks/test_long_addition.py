from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from cortex_core.errors import ConfigError
from cortex_core.tasks.filler import RandomFiller
from cortex_core.tasks.long_addition import LongAddition, SplitAddition
from cortex_core.tasks.vocabulary import TaskVocabulary

PLACES = "abcdefghijklmnopqrstuvwxyzABCDEFG"


def number(text: str) -> int:
    return int(text.replace(" ", ""))


def from_hints(text: str) -> tuple[str, int]:
    """The letters in order, and the number: each digit at the place that its letter names."""
    parts = text.split()
    return "".join(parts[::2]), sum(
        int(d) * 10 ** PLACES.index(a) for a, d in zip(parts[::2], parts[1::2], strict=True)
    )


def test_answer_is_the_sum_from_the_units_up(bpe: PreTrainedTokenizerBase) -> None:
    vocabulary = TaskVocabulary.from_tokenizer(bpe)
    for digits in (1, 4, 32):
        task = LongAddition(vocabulary, RandomFiller(vocabulary), num_digits=digits, index_hints=False)
        for index in range(20):
            example = task.example(index, 2)
            first, second = bpe.decode(task.sheet(index, 1).facts[0].tokens).removesuffix(";").split(" plus")
            total = number(first.removeprefix(" add")) + number(second)
            assert number(bpe.decode(example.tokens[example.answer])[::-1]) == total
            assert example.answer.sum() == digits + 1
            assert f" sum{bpe.decode(example.tokens[example.answer])};" in bpe.decode(example.tokens)


def test_hints_name_the_place_of_each_digit(bpe: PreTrainedTokenizerBase) -> None:
    vocabulary = TaskVocabulary.from_tokenizer(bpe)
    for digits in (1, 4, 32):
        task = LongAddition(vocabulary, RandomFiller(vocabulary), num_digits=digits)
        for index in range(20):
            example = task.example(index, 2)
            fact = bpe.decode(task.sheet(index, 1).facts[0].tokens).removeprefix(" add").removesuffix(";")
            told = [from_hints(text) for text in fact.split(" plus")]
            answer = from_hints(bpe.decode(example.tokens[example.answer]))
            assert [letters for letters, _ in told] == [PLACES[:digits][::-1]] * 2, "most significant first"
            assert answer == (PLACES[: digits + 1], told[0][1] + told[1][1]), "units first"
            assert example.answer.sum() == 2 * (digits + 1)


def test_32_digits_with_hints_fit_a_window_of_256(bpe: PreTrainedTokenizerBase) -> None:
    task = LongAddition(vocabulary := TaskVocabulary.from_tokenizer(bpe), RandomFiller(vocabulary))
    assert task.overhead_tokens(0) == 1 + 131 + 68


def test_the_sum_must_have_a_hint_for_every_digit(bpe: PreTrainedTokenizerBase) -> None:
    vocabulary = TaskVocabulary.from_tokenizer(bpe)
    with pytest.raises(ConfigError, match="num_digits = 33 must lie in 1 to 32 with index hints"):
        LongAddition(vocabulary, RandomFiller(vocabulary), num_digits=33)
    LongAddition(vocabulary, RandomFiller(vocabulary), num_digits=33, index_hints=False)


def test_operands_have_all_their_digits(bpe: PreTrainedTokenizerBase) -> None:
    vocabulary = TaskVocabulary.from_tokenizer(bpe)
    task = LongAddition(vocabulary, RandomFiller(vocabulary), index_hints=False)
    first, second = bpe.decode(task.sheet(0, 1).facts[0].tokens).removesuffix(";").removeprefix(" add").split(" plus")
    assert len(first.split()) == len(second.split()) == 32


def test_split_addition_has_the_gap_between_its_numbers(bpe: PreTrainedTokenizerBase) -> None:
    vocabulary = TaskVocabulary.from_tokenizer(bpe)
    whole, split = (kind(vocabulary, RandomFiller(vocabulary)) for kind in (LongAddition, SplitAddition))
    for index in range(5):
        example = split.example(index, 0)
        assert (example.tokens == whole.example(index, 0).tokens).all(), "without a gap it is the same"
        assert (example.answer == whole.example(index, 0).answer).all()
        (told,), (asked,) = split.sheet(index, 1)
        first, second = bpe.decode(told.tokens), bpe.decode(asked.tokens[: asked.answer_from])
        assert first.startswith(" add") and second.startswith(" plus") and second.endswith("; sum")
        _, total = from_hints(bpe.decode(asked.tokens[asked.answer_from : asked.answer_to]))
        terms = first.removeprefix(" add"), second.removeprefix(" plus").removesuffix("; sum")
        assert sum(from_hints(term)[1] for term in terms) == total
