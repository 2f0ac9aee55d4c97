from __future__ import annotations

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from cortex_core.tasks.copy_reverse import CopyReverse
from cortex_core.tasks.digits import DigitTask
from cortex_core.tasks.filler import RandomFiller
from cortex_core.tasks.long_addition import LongAddition
from cortex_core.tasks.vocabulary import TaskVocabulary


@pytest.fixture(params=[CopyReverse, LongAddition])
def task(request: pytest.FixtureRequest, bpe: PreTrainedTokenizerBase) -> DigitTask:
    vocabulary = TaskVocabulary.from_tokenizer(bpe)
    return request.param(vocabulary, RandomFiller(vocabulary))


def test_fewer_digits_are_drawn_evenly(task: DigitTask) -> None:
    rng = np.random.default_rng(0)
    drawn = {task.smaller(rng).num_digits for _ in range(400)}
    assert drawn == set(range(2, task.num_digits))


@pytest.mark.parametrize("tokens", [30, 50, 64, 100, 400])
def test_as_many_digits_as_have_room(task: DigitTask, tokens: int) -> None:
    found = task.fitting(tokens)
    assert type(found) is type(task) and found.overhead_tokens(3) <= tokens
    if found.num_digits < task.num_digits:
        assert task.fitting(tokens + 20).num_digits > found.num_digits
        longer = type(task)(task.vocabulary, task.filler, num_digits=found.num_digits + 1)
        assert longer.overhead_tokens(3) > tokens
    else:
        assert found is task


def test_two_digits_are_the_fewest(task: DigitTask) -> None:
    assert task.fitting(0).num_digits == 2
