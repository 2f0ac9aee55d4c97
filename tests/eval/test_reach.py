"""Recall by gap, read once and asked from forks, against each example read alone and in one piece."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
import pytest
import torch

from cortex_core.backbone.model import Cortex
from cortex_core.eval.reach import Hits, padded, recall
from cortex_core.tasks.layout import TextTask
from tests import tiny
from tests.tiny import SEGMENT, Ragged

GAPS, INDICES = (0, 5, 32, 33, 100), range(3, 15)


@torch.no_grad()
def asked_directly(model: Cortex, task: TextTask, index: int, gap: int, *, memory: bool) -> bool:
    """The whole example in one call (without memory: its last window), and what was expected at each answer."""
    tokens, answer = task.example(index, gap)
    if not memory:
        tokens, answer = tokens[-SEGMENT:], answer[-SEGMENT:]
    with model.memory(memory):
        logits = model(input_ids=torch.from_numpy(tokens)[None]).logits
    assert logits is not None
    predicted = logits[0].argmax(-1)
    return all(int(predicted[at - 1]) == tokens[at] for at in np.flatnonzero(answer))


@cache
def noisy() -> Cortex:
    return tiny.model(open_gates=True)


@dataclass(frozen=True)
class Strewn(Ragged):
    """The hand-made task with its facts all over the gap."""

    name: ClassVar[str] = "strewn"
    scattered: ClassVar[bool] = True


def strewn(filler: str = "text") -> Strewn:
    like = tiny.ragged(filler)
    return Strewn(like.vocabulary, like.filler)


TASKS = {
    "ragged": (noisy, tiny.ragged), "ragged in random tokens": (noisy, lambda: tiny.ragged("random")),
    "scattered": (noisy, strewn), "scattered in random tokens": (noisy, lambda: strewn("random")),
    "words never seen": (tiny.trained, lambda: tiny.task(split="held_out")),
}  # fmt: skip


@pytest.mark.parametrize("case", TASKS)
def test_every_question_is_answered_as_if_asked_alone(case: str) -> None:
    model, task = (make() for make in TASKS[case])
    found = list(recall(model, task, GAPS, INDICES))
    assert [(hits.gap_tokens, hits.indices) for hits in found] == [(gap, tuple(INDICES)) for gap in GAPS]
    for hits in found:
        for index, on, off in zip(hits.indices, hits.with_memory, hits.bare, strict=True):
            where = f"{case}, gap {hits.gap_tokens}, example {index}"
            assert on == asked_directly(model, task, index, hits.gap_tokens, memory=True), where
            assert off == asked_directly(model, task, index, hits.gap_tokens, memory=False), where
    outcomes = [(on, off) for hits in found for on, off in zip(hits.with_memory, hits.bare, strict=True)]
    assert len(set(outcomes)) > 1, "all outcomes alike: this test could not fail"


def test_the_hand_made_task_is_ragged() -> None:
    """Or the tests above would not see rows that stand at different places."""
    examples = [tiny.ragged().example(index, 0) for index in INDICES]
    assert len({len(example.tokens) for example in examples}) > 3
    assert {int(example.answer.sum()) for example in examples} == {1, 2}


def test_a_trained_memory_reaches_where_the_bare_model_does_not() -> None:
    far = list(recall(tiny.trained(), tiny.task(split="held_out"), [100], range(20)))[-1]
    assert sum(far.with_memory) >= 14 and sum(far.bare) <= 4


def test_scattered_facts_are_told_once_and_stand_elsewhere_in_each_gap() -> None:
    task, lengths = strewn(), [len(strewn().example(index, 0).tokens) for index in INDICES]
    assert lengths == [len(tiny.ragged().example(index, 0).tokens) for index in INDICES]
    near, far = task.example(INDICES[0], 32).tokens, task.example(INDICES[0], 100).tokens
    assert near[: len(near) - 10].tolist() != far[: len(near) - 10].tolist(), "or one reading would do for both"


@pytest.mark.parametrize("make", [tiny.ragged, strewn])
def test_asking_does_not_disturb_what_is_read_on(make: Callable[[], TextTask]) -> None:
    model, task = noisy(), make()
    together = {hits.gap_tokens: hits for hits in recall(model, task, GAPS, INDICES)}
    for gap in GAPS:
        (alone,) = recall(model, task, [gap], INDICES)
        assert alone == together[gap]


@pytest.mark.parametrize("make", [tiny.ragged, strewn])
def test_rows_do_not_depend_on_their_company(make: Callable[[], TextTask]) -> None:
    model, task = noisy(), make()
    batch = list(recall(model, task, GAPS, INDICES))
    for position, index in enumerate(INDICES):
        alone = list(recall(model, task, GAPS, [index]))
        assert [hits.with_memory[0] for hits in alone] == [hits.with_memory[position] for hits in batch]
        assert [hits.bare[0] for hits in alone] == [hits.bare[position] for hits in batch]


def test_gaps_are_asked_once_each_and_in_order() -> None:
    found = list(recall(noisy(), tiny.ragged(), [40, 0, 40, 7], range(2)))
    assert [hits.gap_tokens for hits in found] == [0, 7, 40]


def test_progress_counts_every_token_once() -> None:
    task, read = tiny.ragged(), []
    list(recall(noisy(), task, GAPS, INDICES, on_progress=read.append))
    facts = [len(task.example(index, 0).tokens) - task.query_tokens(index) for index in INDICES]
    assert len(read) == len(GAPS)
    assert sum(read) == sum(facts) + len(INDICES) * max(GAPS)
    assert read[0] == sum(facts)


def test_progress_counts_every_reading_of_scattered_facts() -> None:
    task, read = strewn(), []
    list(recall(noisy(), task, GAPS, INDICES, on_progress=read.append))
    facts = sum(len(task.example(index, 0).tokens) - task.query_tokens(index) for index in INDICES)
    assert read == [facts + len(INDICES) * gap for gap in GAPS]


def test_an_untrained_memory_answers_as_the_bare_model_in_the_window() -> None:
    (hits,) = recall(tiny.model(), tiny.task(), [0], range(20))
    assert hits.with_memory == hits.bare and 0 < sum(hits.bare) < 20
    assert isinstance(hits, Hits)


def test_rows_are_padded_on_the_right() -> None:
    ids, mask = padded([np.array([5, 6, 7]), np.array([8]), np.array([], np.int64)], torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0], [0, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
