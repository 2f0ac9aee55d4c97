"""What a night has to teach: distances over the likeliest tokens and the rest, questions, and who knows what."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex_core.backbone.prompts import Prompts, answers, continuations
from cortex_core.consolidation.lessons import Lessons, Taught, cues, lessons, questions
from tests.consolidation import sleepers

VOCAB = 12


def logits(rows: int, seed: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def whole_kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    p, q = teacher.double().log_softmax(-1), student.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@given(st.integers(0, 10_000), st.integers(1, VOCAB - 1))
@settings(max_examples=40, deadline=None)
def test_kl_over_the_likeliest_is_a_lower_bound_that_tightens(seed: int, top: int) -> None:
    """Throwing tokens together cannot make two distributions more different (data processing)."""
    teacher, student = logits(5, seed), logits(5, seed + 1)
    found = [Taught.from_logits(teacher, k).kl(student).double() for k in (top, min(top + 3, VOCAB - 1))]
    whole = whole_kl(teacher, student)
    assert (found[0] >= -1e-5).all() and (found[0] <= found[1] + 1e-4).all() and (found[1] <= whole + 1e-4).all()


def test_kl_over_all_but_one_is_exact_and_of_itself_is_zero() -> None:
    teacher, student = logits(6, 0), logits(6, 1)
    taught = Taught.from_logits(teacher, VOCAB - 1)
    torch.testing.assert_close(taught.kl(student).double(), whole_kl(teacher, student), atol=1e-4, rtol=1e-4)
    assert taught.kl(teacher).abs().max() < 1e-5


def test_a_teacher_who_is_sure_gives_a_finite_gradient() -> None:
    teacher = torch.full((2, VOCAB), -1e4)
    teacher[:, 3] = 1e4
    student = logits(2, 3).requires_grad_()
    Taught.from_logits(teacher, VOCAB).kl(student).sum().backward()
    assert student.grad is not None and student.grad.isfinite().all() and student.grad.abs().max() > 0.01


def test_cues_are_what_stood_before() -> None:
    assert cues([7, 8, 9, 10], first=20, written=[22, 21, 22, 20, 23], width=2) == [[7, 8], [8, 9]]
    assert cues([7, 8, 9], first=0, written=[0, 1, 2], width=1) == [[7], [8]]


def test_prompts_of_different_lengths_do_not_see_one_another() -> None:
    model = sleepers.fresh_model()
    rows = [[5, 6, 7, 8], [9], [5, 6], [11, 12, 13]]
    together = answers(model, Prompts.of(rows))
    alone = torch.cat([answers(model, Prompts.of([row])) for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("memory_on", [True, False])
def test_an_answer_is_what_continues_the_last_token(memory_on: bool) -> None:
    model = sleepers.fresh_model()
    prompts = Prompts.of([[5, 6, 7, 8], [9], [5, 6], [11, *range(300)]])
    with torch.no_grad(), model.memory(memory_on):
        found, everywhere = answers(model, prompts), continuations(model, prompts)
    last = everywhere[torch.arange(len(prompts)), prompts.lengths - 1]
    torch.testing.assert_close(found, last, atol=1e-5, rtol=1e-5)


def test_lessons_are_what_the_session_knows_and_leave_it_as_it_is() -> None:
    model, book = sleepers.fresh_model(), sleepers.book()
    session = model.new_session(1)
    model.read(torch.tensor([sleepers.stream(1)]), session)
    before = {layer: state.up.clone() for layer, state in session.states.items()}
    told, untold = book.facts[: sleepers.PER_DAY], book.facts[sleepers.PER_DAY :]
    found = lessons(model, session, Prompts.of([book.question(f) for f in [*told, *untold]]), 8, batch_size=5)
    knows = found.taught.top_ids[: len(told), 0] == torch.tensor([fact.value for fact in told])
    assert knows.float().mean() >= 0.75
    gains = found.gain_nats
    assert gains[: len(told)][knows].min() > 2.0 > gains[len(told) :].median(), "of what was not told there is less"
    for layer, up in before.items():
        assert torch.equal(up, session.states[layer].up)


def test_lessons_are_joined_and_picked() -> None:
    taught = Taught.from_logits(logits(3, 5), 4)
    one = Lessons(Prompts.of([[1], [2, 3], [4, 5, 6]]), taught, torch.tensor([3.0, 1.0, 2.0]))
    both = Lessons.joined([one.at(torch.tensor([1])), one])
    assert len(both) == 4 and both.prompts.input_ids.shape == (4, 3)
    assert both.at(both.gain_nats > 1.5).prompts.lengths.tolist() == [1, 3]
    assert len(Lessons.none(4)) == 0
    with pytest.raises(IndexError):
        one.at(torch.tensor([7]))


def test_questions_stand_behind_text_of_the_day() -> None:
    words, asked_for, text = [(1, 2), ()], [[5], [6]], list(range(100, 140))
    assert questions(words, asked_for, text, 0, seed=3) == [(1, 2, 5), (1, 2, 6), (5,), (6,)]
    assert questions(words, asked_for, [], 30, seed=3) == questions(words, asked_for, text, 0, seed=3)
    lengths = set()
    for seed in range(60):
        found = questions(words, asked_for, text, 30, seed)
        assert found == questions(words, asked_for, text, 30, seed) and len(found) == 4
        for question, end in zip(found, [(1, 2, 5), (1, 2, 6), (5,), (6,)], strict=True):
            lead = question[: len(question) - len(end)]
            assert question[len(lead) :] == end and len(lead) <= 30
            assert not lead or [*lead] == [*range(lead[0], lead[0] + len(lead))], "one piece of the text"
            lengths.add(len(lead))
    assert lengths == set(range(31))
