"""What holds for every task, on both tokenizers: exact lengths, answers where the mask says, the same again."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from cortex_core.config import TaskName
from cortex_core.errors import ConfigError
from cortex_core.tasks.corpus import Corpus
from cortex_core.tasks.layout import TextTask
from cortex_core.tasks.mixture import build_task
from cortex_core.tasks.vocabulary import TaskVocabulary

QUESTIONS = get_args(TaskName)


@pytest.fixture(params=[(name, filler) for name in QUESTIONS for filler in ("text", "random")], ids="-".join)
def task(request: pytest.FixtureRequest, vocabulary: TaskVocabulary, corpus: Corpus) -> TextTask:
    name, filler = request.param
    return build_task(name, filler, vocabulary, corpus, split="held_out", seed=3, num_pairs=4)


def length(task: TextTask, part: str, index: int = 0, num_queries: int = 1) -> int:
    return sum(len(piece.tokens) for piece in getattr(task.sheet(index, num_queries), part))


@pytest.mark.parametrize("gap", [0, 1, 7, 300, 2000])
def test_gap_is_exact(task: TextTask, gap: int) -> None:
    example = task.example(5, gap)
    bare = task.example(5, 0)
    start = len(task.vocabulary.prefix) + length(task, "facts", 5)
    assert len(example.tokens) == len(example.answer) == len(bare.tokens) + gap
    assert len(bare.tokens) == task.overhead_tokens(5)
    assert np.array_equal(example.tokens[:start], bare.tokens[:start])
    assert np.array_equal(example.tokens[start + gap :], bare.tokens[start:])
    assert not example.answer[: start + gap].any()


def test_same_index_same_example(task: TextTask) -> None:
    one, again = task.example(2, 40), task.example(2, 40)
    assert np.array_equal(one.tokens, again.tokens)
    assert np.array_equal(one.answer, again.answer)
    assert not np.array_equal(one.tokens, task.example(3, 40).tokens)
    window, window_again = task.in_window_example(2, 200), task.in_window_example(2, 200)
    assert np.array_equal(window.tokens, window_again.tokens)


def test_question_opens_with_its_marker_and_ends_with_the_answer(task: TextTask) -> None:
    query = task.sheet(1, 1).queries[0]
    end = len(query.tokens) - len(task.vocabulary.pieces[";"])
    assert (query.answer_to, query.tokens[end:]) == (end, list(task.vocabulary.pieces[";"]))
    assert 0 < query.answer_from < query.answer_to


def test_window_is_exact_and_holds_every_part_in_order(task: TextTask) -> None:
    total = length(task, "facts") + length(task, "queries", num_queries=3) + 40
    openings = set()
    for index in range(12):
        example = task.in_window_example(index, total, num_queries=3)
        assert example.tokens.shape == example.answer.shape == (total,)
        at = 0
        sheet = task.sheet(index, 3)
        for part in [*sheet.facts, *sheet.queries]:
            at = find(example.tokens, part.tokens, at) + len(part.tokens)
        asked = [token for part in sheet.queries for token in part.tokens[part.answer_from : part.answer_to]]
        assert example.tokens[example.answer].tolist() == asked
        openings.add(tuple(example.tokens[:1]) == task.vocabulary.prefix)
    if task.vocabulary.prefix:
        assert openings == {True, False}, "some rows open a document, others start in the middle"


def find(tokens: np.ndarray, part: list[int], start: int) -> int:
    """Position of `part` in `tokens` from `start` on."""
    views = np.lib.stride_tricks.sliding_window_view(tokens[start:], len(part))
    hits = np.flatnonzero((views == np.array(part)).all(axis=1))
    assert hits.size, f"{part} is not in the window after {start}"
    return start + int(hits[0])


def test_window_without_facts_still_says_where_the_answer_is(task: TextTask) -> None:
    total = length(task, "facts") + length(task, "queries") + 60
    whole, bare = (task.in_window_example(4, total, with_facts=given) for given in (True, False))
    assert len(bare.tokens) == total
    assert bare.tokens[bare.answer].tolist() == whole.tokens[whole.answer].tolist()
    facts = task.sheet(4, 1).facts[0].tokens
    views = np.lib.stride_tricks.sliding_window_view(bare.tokens, len(facts))
    assert not (views == np.array(facts)).all(axis=1).any()


def test_spanning_example_has_facts_in_the_first_segment_and_questions_in_the_last(task: TextTask) -> None:
    width = max(length(task, "facts"), length(task, "queries")) + 30
    starts, ends, openings = set(), set(), set()
    for index in range(24):
        example = task.spanning_example(index, 700, segment_tokens=width)
        assert example.tokens.shape == (700,)
        sheet = task.sheet(index, 1)
        fact = find(example.tokens, [token for part in sheet.facts for token in part.tokens], 0)
        query = find(example.tokens, sheet.queries[0].tokens, fact)
        opens = fact == len(task.vocabulary.prefix) and tuple(example.tokens[:fact]) == task.vocabulary.prefix
        assert fact + length(task, "facts") <= width + len(task.vocabulary.prefix)
        assert query >= 700 - width
        asked = sheet.queries[0].tokens[sheet.queries[0].answer_from : sheet.queries[0].answer_to]
        assert example.tokens[example.answer].tolist() == asked
        starts.add(fact)
        ends.add(query)
        openings.add(opens)
    assert len(starts) > 5, "the place of the facts varies"
    assert len(ends) > 5, "the place of the question varies"
    assert openings == {True, False}


def test_what_does_not_fit_is_refused(task: TextTask) -> None:
    with pytest.raises(ConfigError, match="total_tokens = 9 is too short"):
        task.in_window_example(0, 9)
    with pytest.raises(ConfigError, match="total_tokens = 9 is too short"):
        task.spanning_example(0, 9)
    with pytest.raises(ConfigError, match="gap_tokens = -1 must be at least 0"):
        task.example(0, -1)


def test_random_filler_holds_no_markers(vocabulary: TaskVocabulary, corpus: Corpus) -> None:
    task = build_task("key_value", "random", vocabulary, corpus)
    start = len(vocabulary.prefix) + length(task, "facts")
    filler = task.example(0, 5000).tokens[start : start + 5000]
    assert set(filler) <= set(vocabulary.random_ids)
    assert len(set(filler)) > 0.8 * len(vocabulary.random_ids)


def test_text_filler_is_real_text_of_the_right_split(vocabulary: TaskVocabulary, corpus: Corpus) -> None:
    for split in ("train", "held_out"):
        task = build_task("key_value", "text", vocabulary, corpus, split=split)
        source, other = corpus.tokens(split), corpus.tokens("held_out" if split == "train" else "train")
        start = len(vocabulary.prefix) + length(task, "facts")
        filler = task.example(0, 90).tokens[start : start + 90]
        assert contains(np.concatenate([source, source]), filler)
        assert not contains(np.concatenate([other, other]), filler)


def contains(tokens: np.ndarray, run: np.ndarray) -> bool:
    views = np.lib.stride_tricks.sliding_window_view(tokens, len(run))
    return bool((views == run).all(axis=1).any())
