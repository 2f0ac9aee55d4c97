from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from cortex_core.tasks.filler import RandomFiller
from cortex_core.tasks.long_addition import LongAddition
from cortex_core.tasks.vocabulary import TaskVocabulary


def number(text: str) -> int:
    return int(text.replace(" ", ""))


def test_answer_is_the_sum_from_the_units_up(bpe: PreTrainedTokenizerBase) -> None:
    vocabulary = TaskVocabulary.from_tokenizer(bpe)
    for digits in (1, 4, 32):
        task = LongAddition(vocabulary, RandomFiller(vocabulary), num_digits=digits)
        for index in range(20):
            example = task.example(index, 2)
            first, second = bpe.decode(task.sheet(index, 1).facts[0].tokens).removesuffix(";").split(" plus")
            total = number(first.removeprefix(" add")) + number(second)
            assert number(bpe.decode(example.tokens[example.answer])[::-1]) == total
            assert example.answer.sum() == digits + 1
            assert f" sum{bpe.decode(example.tokens[example.answer])};" in bpe.decode(example.tokens)


def test_operands_have_all_their_digits(bpe: PreTrainedTokenizerBase) -> None:
    vocabulary = TaskVocabulary.from_tokenizer(bpe)
    task = LongAddition(vocabulary, RandomFiller(vocabulary))
    first, second = bpe.decode(task.sheet(0, 1).facts[0].tokens).removesuffix(";").removeprefix(" add").split(" plus")
    assert len(first.split()) == len(second.split()) == 32
