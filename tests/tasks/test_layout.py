"""What holds for every task, on both tokenizers: exact lengths, answers where the mask says, the same again."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import get_args

import numpy as np
import pytest

from cortex_core.config import TaskName
from cortex_core.errors import ConfigError
from cortex_core.tasks.corpus import Corpus
from cortex_core.tasks.layout import TextTask
from cortex_core.tasks.mixture import build_task
from cortex_core.tasks.vocabulary import TaskVocabulary
from tests import tiny

QUESTIONS = get_args(TaskName)


@pytest.fixture(params=[(name, filler) for name in QUESTIONS for filler in ("text", "random")], ids="-".join)
def task(request: pytest.FixtureRequest, vocabulary: TaskVocabulary, corpus: Corpus) -> TextTask:
    name, filler = request.param
    return build_task(name, filler, vocabulary, corpus, split="held_out", seed=3, num_pairs=4)


def length(task: TextTask, part: str, index: int = 0, num_queries: int = 1) -> int:
    return sum(len(piece.tokens) for piece in getattr(task.sheet(index, num_queries), part))


@pytest.mark.parametrize("gap", [0, 1, 7, 300, 2000])
def test_gap_is_exact(task: TextTask, gap: int) -> None:
    example, sheet = task.example(5, gap), task.sheet(5, 1)
    asked = [token for part in sheet.queries for token in part.tokens]
    first_query = len(example.tokens) - len(asked)
    assert len(example.tokens) == len(example.answer) == task.overhead_tokens(5) + gap
    assert task.overhead_tokens(5) <= task.max_overhead_tokens()
    assert len(asked) == task.query_tokens(5)
    assert example.tokens[first_query:].tolist() == asked
    assert not example.answer[:first_query].any()
    opening = len(task.vocabulary.prefix)
    assert tuple(example.tokens[:opening]) == task.vocabulary.prefix
    runs = between(example.tokens[opening:first_query], [part.tokens for part in sheet.facts])
    filler = task.filler.tokens((3, 1, 5), gap)
    assert np.concatenate(runs).tolist() == filler.tolist()
    assert task.scattered or [len(run) for run in runs[:-1]] == [0] * len(sheet.facts)


def between(tokens: np.ndarray, parts: list[list[int]]) -> list[np.ndarray]:
    """What stands before, between and after `parts`, which are in `tokens` in this order."""
    runs, at = [], 0
    for part in parts:
        found = find(tokens, part, at)
        runs.append(tokens[at:found])
        at = found + len(part)
    return [*runs, tokens[at:]]


def test_scattered_facts_stand_all_over_the_gap(vocabulary: TaskVocabulary, corpus: Corpus) -> None:
    task = build_task("needle_multi_value", "random", vocabulary, corpus, seed=3)
    opening, places = len(vocabulary.prefix), []
    for index in range(200):
        tokens = task.example(index, 60).tokens[opening:]
        runs = between(tokens, [part.tokens for part in task.sheet(index, 1).facts])
        ends = np.cumsum([len(run) for run in runs])
        longer = between(
            task.example(index, 600).tokens[opening:], [part.tokens for part in task.sheet(index, 1).facts]
        )
        assert np.abs(np.cumsum([len(run) for run in longer])[:4] / 601 - ends[:4] / 61).max() < 1 / 61
        places += ends[:4].tolist()
    assert {0, 60} <= set(places), "a fact may open the document, or stand right before the question"
    assert np.histogram(places, 6, (0, 61))[0].min() > 90, "evenly: 800 facts in 6 parts of the gap"


def test_same_index_same_example(task: TextTask) -> None:
    one, again = task.example(2, 40), task.example(2, 40)
    assert np.array_equal(one.tokens, again.tokens)
    assert np.array_equal(one.answer, again.answer)
    assert not np.array_equal(one.tokens, task.example(3, 40).tokens)
    window, window_again = task.in_window_example(2, 230), task.in_window_example(2, 230)
    assert np.array_equal(window.tokens, window_again.tokens)


def test_question_opens_with_its_marker_and_ends_with_the_answer(task: TextTask) -> None:
    query = task.sheet(1, 1).queries[0]
    end = len(query.tokens) - len(task.vocabulary.pieces[";"])
    assert (query.answer_to, query.tokens[end:]) == (end, list(task.vocabulary.pieces[";"]))
    assert 0 < query.answer_from < query.answer_to


def test_window_is_exact_and_holds_every_part_in_order(task: TextTask) -> None:
    total = task.max_overhead_tokens(num_queries=3) + 40
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
    width = task.max_overhead_tokens() + 30
    prefix = task.vocabulary.prefix
    starts, lasts, ends, openings = set(), set(), set(), set()
    for index in range(24):
        example = task.spanning_example(index, 700, segment_tokens=width)
        assert example.tokens.shape == (700,)
        sheet = task.sheet(index, 1)
        queries = [token for part in sheet.queries for token in part.tokens]
        runs = between(example.tokens, [*(part.tokens for part in sheet.facts), queries])
        query = 700 - len(queries) - len(runs[-1])
        last = query - len(runs[-2])
        border = 700 - width - query
        assert border <= 0 or border < sheet.queries[0].answer_from, (
            "questions in the last segment, or the first is cut"
        )
        assert task.scattered or last <= width + len(prefix) or len(runs[0]) < width, "or its end cuts a fact"
        assert task.scattered or not any(map(len, runs[1:-2])), "facts together"
        asked = [token for part in sheet.queries for token in part.tokens[part.answer_from : part.answer_to]]
        assert example.tokens[example.answer].tolist() == asked
        starts.add(len(runs[0]))
        lasts.add(last)
        ends.add(query)
        openings.add(tuple(example.tokens[: len(prefix)]) == prefix and (task.scattered or len(runs[0]) == len(prefix)))
    assert len(starts) > 5, "the place of the facts varies"
    assert len(ends) > 5, "the place of the question varies"
    assert openings == ({True, False} if prefix or not task.scattered else {True})
    if task.scattered:
        assert max(lasts) > 700 - width, "facts may come as late as the questions"


def test_the_ends_of_segments_cut_a_quarter_of_the_facts_and_of_the_questions() -> None:
    """In training too, or it would never learn what to make of the halves."""
    task, width, facts, questions = tiny.task(), tiny.SEGMENT, [], []
    for index in range(400):
        example = task.spanning_example(index, 4 * width, segment_tokens=width)
        sheet, at = task.sheet(index, 1), 0
        for part in [*sheet.facts, *sheet.queries]:
            start = find(example.tokens, part.tokens, at)
            at = start + len(part.tokens)
            (questions if part.answer_from >= 0 else facts).append(start // width < (at - 1) // width)
        asked = np.flatnonzero(example.answer)
        assert asked.min() >= 3 * width, "the answer stands in the last segment"
    assert len(questions) == 400 and np.mean(questions) == pytest.approx(0.25, abs=0.07)
    assert np.mean(facts) * len(facts) / 400 == pytest.approx(0.25 * 2 / 3, abs=0.07)  # not where facts open a document


def test_what_does_not_fit_is_refused(task: TextTask) -> None:
    with pytest.raises(ConfigError, match="total_tokens = 7 is too short"):
        task.in_window_example(0, 7)
    with pytest.raises(ConfigError, match="total_tokens = 7 is too short"):
        task.spanning_example(0, 7)
    with pytest.raises(ConfigError, match="gap_tokens = -1 must be at least 0"):
        task.example(0, -1)


def test_any_tokens_are_the_words_of_a_share_of_the_examples() -> None:
    vocabulary, corpus = tiny.vocabulary(), tiny.corpus()
    words = {*vocabulary.keys["train"].tolist(), *vocabulary.values["train"].tolist()}
    known = words | {token for ids in vocabulary.pieces.values() for token in ids}
    for name in QUESTIONS:
        task, plain = (build_task(name, "random", vocabulary, corpus, num_pairs=4, any_token_frac=f) for f in (0.5, 0))
        told = [{token for part in task.sheet(i, 1).facts for token in part.tokens} for i in range(60)]
        beyond = sum(not tokens <= known for tokens in told)
        assert beyond == 0 if name in ("copy_reverse", "long_addition", "split_addition") else 12 < beyond < 48, name
        assert not set().union(*told) & set(vocabulary.held_out_words().tolist())
        assert all({t for part in plain.sheet(i, 1).facts for t in part.tokens} <= known for i in range(20))


def test_words_are_distinct_even_where_keys_may_be_values(vocabulary: TaskVocabulary, corpus: Corpus) -> None:
    few = MappingProxyType({"train": vocabulary.shared_ids[:9]})
    task = build_task("needle_multi_key", "random", replace(vocabulary, keys=few, values=few), corpus, num_pairs=4)
    for index in range(50):
        keys, values = task.words(index, task.rng(index), 4, 5)
        assert (len(keys), len(values)) == (4, 5)
        assert {*keys, *values} == set(few["train"].tolist())


def test_chance_is_a_share(task: TextTask) -> None:
    assert 0 < task.chance() <= 0.5


def test_chance_counts_what_a_guess_could_be(vocabulary: TaskVocabulary, corpus: Corpus) -> None:
    word = 1 / len(vocabulary.values["held_out"])
    expected = {
        "key_value": word, "forgetting": word, "n_back": word, "multi_query_recall": word, "needle_single": word,
        "needle_multi_key": word, "needle_multi_value": word**4, "needle_multi_query": word**4, "copy_reverse": 1e-12,
        "long_addition": 5e-33, "variable_tracking": 1 / 2, "world_qa1": 1 / 4, "world_qa2": 1 / 3, "world_qa3": 1 / 4,
        "world_qa4": 1 / 5, "world_qa5": 1 / 3, "split_addition": 5e-33,
    }  # fmt: skip
    found = {
        name: build_task(name, "random", vocabulary, corpus, split="held_out", num_pairs=4).chance()
        for name in QUESTIONS
    }
    assert found == pytest.approx(expected, rel=1e-9)


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
