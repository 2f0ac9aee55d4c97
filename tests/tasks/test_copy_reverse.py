from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from cortex_core.tasks.copy_reverse import CopyReverse
from cortex_core.tasks.filler import RandomFiller
from cortex_core.tasks.vocabulary import TaskVocabulary


def test_answer_is_the_digits_backwards(bpe: PreTrainedTokenizerBase) -> None:
    vocabulary = TaskVocabulary.from_tokenizer(bpe)
    task = CopyReverse(vocabulary, RandomFiller(vocabulary), "held_out", 0)
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


def test_it_is_asked_once(bpe: PreTrainedTokenizerBase) -> None:
    vocabulary = TaskVocabulary.from_tokenizer(bpe)
    task = CopyReverse(vocabulary, RandomFiller(vocabulary))
    assert task.example(0, 5, num_queries=6).answer.sum() == 12
