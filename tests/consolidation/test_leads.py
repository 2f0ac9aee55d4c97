"""Leads are ordinary text in front of questions: other text at each call, the same for the same night."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from cortex_core.consolidation.leads import Leads
from cortex_core.consolidation.lessons import Lessons
from cortex_core.errors import ConfigError
from tests.consolidation.unfreeze_scenes import facts, text

LESSONS = facts()[0]
WIDTH = 24


def rows(lessons: Lessons) -> list[list[int]]:
    return [
        ids[:length]
        for ids, length in zip(lessons.prompts.input_ids.tolist(), lessons.prompts.lengths.tolist(), strict=True)
    ]


def leads_of(lessons: Lessons) -> list[list[int]]:
    return [row[:-3] for row in rows(lessons)]


def stands_in(part: list[int], windows: Tensor) -> bool:
    return any(part == window[at : at + len(part)] for window in windows.tolist() for at in range(WIDTH))


def test_a_question_stands_at_the_end_behind_text_and_its_answer_stays() -> None:
    windows = text()
    led = Leads(windows, 10)(LESSONS)
    assert [row[-3:] for row in rows(led)] == rows(LESSONS)
    assert all(stands_in(lead, windows) and len(lead) <= 10 for lead in leads_of(led))
    assert led.taught is LESSONS.taught and led.gain_nats is LESSONS.gain_nats


def test_another_at_each_call_and_the_same_for_a_night() -> None:
    leads = Leads(text(), 10, seed=3)
    calls = [rows(leads(LESSONS)) for _ in range(4)]
    assert all(one != other for one, other in pairwise(calls))
    leads.begin(0)
    assert rows(leads(LESSONS)) == calls[0]
    leads.begin(1)
    assert rows(leads(LESSONS)) != calls[0]
    assert rows(Leads(text(), 10, seed=4)(LESSONS)) != calls[0]


def test_few_tokens_are_as_common_as_many() -> None:
    """Even in the logarithm: of 0 to 14 tokens, a quarter each has 0, 1 to 2, 3 to 6, and 7 or more."""
    leads = Leads(text(), 14)
    lengths = [len(lead) for _ in range(100) for lead in leads_of(leads(LESSONS))]
    assert max(lengths) == 14
    quarters = torch.bucketize(torch.tensor(lengths), torch.tensor([0, 2, 6])).bincount(minlength=4) / len(lengths)
    torch.testing.assert_close(quarters, torch.full((4,), 0.25), atol=0.06, rtol=0)  # four standard errors


def test_question_and_lead_lie_in_one_window() -> None:
    leads = Leads(text(), 1000)
    lengths = [len(row) for _ in range(50) for row in rows(leads(LESSONS))]
    assert 16 < max(lengths) <= WIDTH
    long = Lessons.joined([facts(2)[0]])
    long = Lessons(long.prompts._make((text(2), torch.full((2,), WIDTH))), long.taught, long.gain_nats)
    assert rows(leads(long)) == rows(long), "there is no room"


def test_one_token_is_one_at_most() -> None:
    leads = Leads(text(), 1)
    assert {len(lead) for _ in range(10) for lead in leads_of(leads(LESSONS))} == {0, 1}


def test_none_are_asked_for() -> None:
    assert Leads(text(0), 0)(LESSONS) is LESSONS
    with pytest.raises(ConfigError, match="lead_tokens = 5: leads need at least one window of text, or be 0"):
        Leads(text(0), 5)
