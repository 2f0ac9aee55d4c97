"""The judge: each reason by a dream that deserves it, and laws of what passes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cortex_core.config import JudgeConfig
from cortex_core.dreaming.decode import Decoded
from cortex_core.dreaming.dream import Dream
from cortex_core.dreaming.graph import MemoryGraph
from cortex_core.dreaming.judge import Reason, Verdict, judge
from cortex_core.dreaming.ngrams import NgramSet
from cortex_core.errors import ConfigError
from tests.dreaming.scenes import dream, filled, memories, memory

Rows = list[tuple[int, int, int]]
RECORD = MemoryGraph.of(memories(40)).record
CONFIG = JudgeConfig(set_bits=16)


def said(*dreams: Dream, config: JudgeConfig = CONFIG, **sets: NgramSet) -> list[Verdict]:
    return judge(dreams, RECORD, config, **sets)[0]


def reasons(of: Dream, **more: NgramSet) -> tuple[Reason, ...]:
    return said(of, **more)[0].reasons


def answered(ticket: int, *tokens: int, margin: float = 2.0) -> Dream:
    return dream(ticket, answer=Decoded(tokens, (-0.1,) * len(tokens), (margin,) * len(tokens)))


def test_a_good_dream_passes_with_all_its_scores() -> None:
    (found,) = said(dream(0))
    assert found.passed and found.verified and found.dream_id == "v1/0/0"
    assert found.scores == (pytest.approx(-0.2), 2.0, pytest.approx(3.0), None, 1.0, 0.0)


def test_an_answer_is_right_only_to_the_last_token() -> None:
    right = memory(0).answer
    assert reasons(answered(0, *right)) == ()
    for wrong in ((right[0] + 1,), (*right, 4), ()):
        assert reasons(answered(0, *wrong)) == (Reason.WRONG_ANSWER,)


def test_what_counts_is_the_newest_that_was_written() -> None:
    graph = MemoryGraph.of([memory(0), memory(1, cue=memory(0).cue)])
    verdicts, _ = judge([answered(0, *memory(0).answer), answered(1, *memory(1).answer)], graph.record, CONFIG)
    assert verdicts[0].reasons == (Reason.WRONG_ANSWER,)
    both = [replace(answered(t, *memory(t).answer), question=memory(0).cue) for t in (0, 1)]
    assert [v.passed for v in judge(both, graph.record, CONFIG)[0]] == [False, True]


@pytest.mark.parametrize(
    ("nats", "expected"),
    [(1.4, (Reason.REPETITIVE,)), (1.6, ()), (5.9, ()), (6.1, (Reason.NOISE,)), (float("nan"), (Reason.NOISE,))],
)
def test_filler_lies_in_a_band(nats: float, expected: tuple[Reason, ...]) -> None:
    assert reasons(filled(0, nats)) == expected
    assert reasons(filled(0, nats, tokens=CONFIG.band_tokens - 1)) == ()


def test_without_filler_there_is_no_band() -> None:
    (found,) = said(filled(0, 0.0, tokens=0))
    assert found.passed and found.scores.filler_nats is None


def test_filler_that_stands_in_the_corpus_is_copied() -> None:
    read = NgramSet.empty(4, 16).with_rows([dream(0).filler.tokens])
    assert reasons(dream(0), corpus=read) == (Reason.COPIED,)
    assert reasons(dream(1), corpus=read) == ()


def test_a_dream_is_not_dreamed_again() -> None:
    verdicts, earlier = judge([dream(0), answered(1, 3)], RECORD, CONFIG)
    assert [v.passed for v in verdicts] == [True, False]
    assert reasons(dream(0), earlier=earlier) == (Reason.DREAMED_BEFORE,)
    assert reasons(dream(1), earlier=earlier) == (), "only what passed counts"


def test_of_two_alike_the_lower_ticket_is_kept() -> None:
    twin = replace(dream(0), ticket=5, filler=dream(0).filler)
    verdicts = said(twin, dream(0), dream(2))
    assert [v.reasons for v in verdicts] == [(Reason.TOO_ALIKE,), (), ()]
    assert verdicts[0].scores.overlap == 1.0


def test_a_bare_question_is_asked_once() -> None:
    verdicts = said(*(replace(filled(0, 3.0, tokens=0), ticket=t) for t in (0, 1)))
    assert [v.reasons for v in verdicts] == [(), (Reason.TOO_ALIKE,)]


def test_overlap_is_that_of_jaccard() -> None:
    """Six n-grams each, four of them shared: 4 / 8."""
    one = dream(0, prompt=(1, 2, 3, 4, 5, 6, 7, 8, 9))
    other = dream(1, prompt=(1, 2, 3, 4, 5, 6, 7, 20, 21))
    assert [v.scores.overlap for v in said(one, other)] == [0.0, 0.5]
    assert said(one, other, config=JudgeConfig(max_overlap=0.49))[1].reasons == (Reason.TOO_ALIKE,)


@pytest.mark.parametrize(
    ("margin", "expected"), [(1.9, (Reason.UNSURE,)), (2.1, ()), (19.0, ()), (21.0, (Reason.TOO_SURE,))]
)
def test_what_is_not_on_record_needs_a_margin(margin: float, expected: tuple[Reason, ...]) -> None:
    unknown = replace(answered(0, 3, margin=margin), question=(1, 2))
    (found,) = said(unknown)
    assert not found.verified and found.reasons == expected
    assert not judge([unknown], {(1, 2): ()}, CONFIG)[0][0].verified, "nor can an empty answer be verified"


def test_the_margin_of_an_answer_is_that_of_its_weakest_token() -> None:
    (found,) = said(dream(0, question=(1, 2), answer=Decoded((3, 4), (-0.5, -0.25), (9.0, 0.3))))
    assert found.scores.margin_nats == 0.3 and found.scores.answer_nats == -0.75


def test_all_that_speaks_against_a_dream_is_named() -> None:
    bad = replace(filled(0, 0.5), answer=Decoded((1,), (-3.0,), (0.0,)))
    read = NgramSet.empty(4, 16).with_rows([bad.prompt])
    assert reasons(bad, corpus=read, earlier=read) == (
        Reason.WRONG_ANSWER, Reason.REPETITIVE, Reason.COPIED, Reason.DREAMED_BEFORE,
    )  # fmt: skip


def scene(ticket: int, start: int, length: int, answer: int) -> Dream:
    """Filler that overlaps that of others, and an answer that is right for one of the first three."""
    filler = tuple(range(start, start + length))
    return dream(
        ticket, filler=Decoded(filler, (-3.0,) * length, (0.0,) * length), prompt=(*filler, *memory(ticket % 3).cue),
        question=memory(ticket % 3).cue, answer=Decoded((answer,), (-1.0,), (1.0,)),
    )  # fmt: skip


SCENES = st.tuples(st.integers(1000, 1010), st.integers(0, 12), st.sampled_from([300, 301, 302]))
ROWS = st.lists(SCENES, max_size=8)


@given(ROWS, st.integers(0, 1000))
def test_the_order_in_which_dreams_come_does_not_matter(rows: Rows, seed: int) -> None:
    dreams = [scene(ticket, *row) for ticket, row in enumerate(rows)]
    shuffled = [dreams[at] for at in np.random.default_rng(seed).permutation(len(dreams))]
    verdicts, earlier = judge(dreams, RECORD, CONFIG)
    again, other = judge(shuffled, RECORD, CONFIG)
    assert {v.dream_id: v for v in verdicts} == {v.dream_id: v for v in again}
    assert earlier.bits.tolist() == other.bits.tolist()
    assert [v.dream_id for v in verdicts] == [d.id for d in dreams]


@given(ROWS)
def test_nothing_that_passes_is_wrong_or_alike(rows: Rows) -> None:
    dreams = [scene(ticket, *row) for ticket, row in enumerate(rows)]
    passed = [d for d, v in zip(dreams, said(*dreams), strict=True) if v.passed]
    assert all(d.answer.tokens == RECORD[d.question] for d in passed)
    for one in passed:
        for other in passed:
            a, b = ({d.prompt[at : at + 4] for at in range(max(1, len(d.prompt) - 3))} for d in (one, other))
            assert one is other or len(a & b) / len(a | b) <= CONFIG.max_overlap


def test_sets_of_other_ngrams_are_refused() -> None:
    with pytest.raises(ConfigError, match="corpus holds n-grams of 3 tokens, ngram_tokens = 4"):
        said(dream(0), corpus=NgramSet.empty(3, 16))


def test_empty_bands_are_refused() -> None:
    with pytest.raises(ValidationError, match="every dream is rejected"):
        JudgeConfig(min_filler_nats=6.0)
