from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import MappingProxyType
from typing import get_args

import numpy as np
import pytest
from pydantic import ValidationError

from cortex_core.config import EvaluationConfig, TaskName, TasksConfig
from cortex_core.errors import ConfigError
from cortex_core.tasks.corpus import Corpus
from cortex_core.tasks.layout import Example
from cortex_core.tasks.mixture import Mixture, build_task, check_tasks, stack
from cortex_core.tasks.vocabulary import TaskVocabulary
from pipelines.config import RunConfig, load_config

TASKS = TasksConfig(names=("key_value", "copy_reverse", "n_back", "long_addition"), num_pairs=4)
EVERYTHING = TASKS.model_copy(update={"names": (*TASKS.names, "corpus")})


@pytest.fixture
def mixture(vocabulary: TaskVocabulary, corpus: Corpus) -> Mixture:
    return Mixture.from_config(EVERYTHING, vocabulary, corpus, seed=9)


def test_tasks_and_their_fillers_are_equally_likely(mixture: Mixture) -> None:
    drawn = Counter((mixture.task(index).name, mixture.task(index).filler.name) for index in range(2000))
    for name in EVERYTHING.names:
        share = sum(count for (task, _), count in drawn.items() if task == name) / 2000
        assert 0.16 < share < 0.24
    assert len(drawn) == 9, "four tasks with two fillers each, and the text"
    assert sum(mixture.weights) == pytest.approx(1.0)


def test_the_draw_depends_on_seed_and_index_alone(vocabulary: TaskVocabulary, corpus: Corpus, mixture: Mixture) -> None:
    again = Mixture.from_config(EVERYTHING, vocabulary, corpus, seed=9)
    other = Mixture.from_config(EVERYTHING, vocabulary, corpus, seed=10)
    names = [[(m.task(index).name, m.task(index).filler.name) for index in range(60)] for m in (mixture, again, other)]
    assert names[0] == names[1] != names[2]


def test_batches_are_rectangles_of_the_examples(mixture: Mixture) -> None:
    spanning = mixture.spanning_batch(range(10), 400, num_queries=2, segment_tokens=200)
    windows = mixture.in_window_batch(range(10), 230)
    assert spanning.tokens.shape == spanning.answer.shape == (10, 400)
    assert windows.tokens.shape == windows.answer.shape == (10, 230)
    row = mixture.task(4).in_window_example(4, 230)
    assert np.array_equal(windows.tokens[4], row.tokens)
    assert np.array_equal(windows.answer[4], row.answer)


def test_any_share_of_a_batch_is_the_same_rows(mixture: Mixture) -> None:
    """Workers split a batch by index: together they read what one worker would."""
    whole = mixture.spanning_batch(range(6), 300)
    parts = [mixture.spanning_batch(part, 300) for part in (range(2), range(2, 6))]
    assert np.array_equal(whole.tokens, np.concatenate([part.tokens for part in parts]))


def test_numbers_are_as_long_as_there_is_room_for(mixture: Mixture) -> None:
    index = next(index for index in range(100) if mixture.task(index).name == "long_addition")
    for room, digits in ((40, 5), (64, 9), (256, 32)):
        batch = mixture.fitting(room).spanning_batch([index], 300, segment_tokens=150)
        assert int(batch.answer.sum()) == 2 * (digits + 1)  # with a letter before each
    names = [[mixed.task(index).name for index in range(60)] for mixed in (mixture, mixture.fitting(0))]
    assert names[0] == names[1]


def test_text_asks_nothing_and_opens_no_document(vocabulary: TaskVocabulary, corpus: Corpus) -> None:
    task = build_task("corpus", "text", vocabulary, corpus)
    spanning = task.spanning_example(0, 50, segment_tokens=20)
    for example in (task.example(0, 50), task.in_window_example(0, 50), spanning):
        assert example.tokens.shape == (50,)
        assert example is spanning or not example.answer.any()
        assert set(example.tokens) <= set(corpus.train.tolist())
        assert np.array_equal(example.tokens, corpus.excerpt((0, 0, 0, 7), 50, "train"))
    # Each is predicted from a token of the second segment or a later one: the first segment is read, and no more.
    assert np.flatnonzero(spanning.answer).tolist() == list(range(21, 50))


def test_held_out_words_never_occur_in_a_training_task(vocabulary: TaskVocabulary, corpus: Corpus) -> None:
    held_out = set(vocabulary.held_out_words())
    for name in get_args(TaskName):
        if name in ("copy_reverse", "long_addition", "split_addition"):
            continue  # they have no words
        train, test = (build_task(name, "random", vocabulary, corpus, split=split) for split in ("train", "held_out"))
        for index in range(40):
            sheet = train.sheet(index, 6)
            content = [token for part in (*sheet.facts, *sheet.queries) for token in part.tokens]
            assert not held_out & set(content)
        asked = {token for part in test.sheet(0, 6).facts for token in part.tokens}
        assert held_out & asked


def test_plain_text_can_be_trained_on_and_asks_no_question_to_evaluate() -> None:
    assert TasksConfig(names=("key_value", "corpus")).names == ("key_value", "corpus")
    with pytest.raises(ValidationError, match=r"'key_value', 'copy_reverse', .*'world_qa5' or 'split_addition' "):
        EvaluationConfig.model_validate({"tasks": ("key_value", "corpus")})


def configured(**values: object) -> RunConfig:
    return load_config(None, {name.replace("__", "."): value for name, value in values.items()})


def test_whatever_passes_the_check_can_be_made(vocabulary: TaskVocabulary, corpus: Corpus) -> None:
    small = {"tasks__names": ["n_back"], "fast_weights__chunk_size": 8}
    task = build_task("n_back", "random", vocabulary, corpus)
    needed = -(-task.overhead_tokens(0, num_queries=6) // 8) * 8
    fits = configured(**small, backbone__segment_tokens=needed)
    check_tasks(fits, vocabulary, corpus)
    Mixture.from_config(fits.tasks, vocabulary, corpus).in_window_batch(range(20), needed, num_queries=6)
    halves = configured(**small, backbone__segment_tokens=-(-needed // 16) * 8, training__in_window_batch_size=0)
    check_tasks(halves, vocabulary, corpus)
    narrow = configured(**small, backbone__segment_tokens=needed - 8)
    with pytest.raises(
        ConfigError, match=r"^tasks\.num_queries = 6 with tasks\.num_pairs = 6: .*of n_back take \d+ tokens"
    ):
        check_tasks(narrow, vocabulary, corpus)


def test_more_pairs_than_held_out_keys_are_refused(vocabulary: TaskVocabulary, corpus: Corpus) -> None:
    keys = len(vocabulary.keys["held_out"])
    check_tasks(configured(tasks__num_pairs=keys), vocabulary, corpus)
    with pytest.raises(
        ConfigError, match=rf"^tasks\.num_pairs = {keys + 1}: must be at most {keys}.*num_pairs={keys} or"
    ):
        check_tasks(configured(tasks__num_pairs=keys + 1), vocabulary, corpus)


def test_evaluation_needs_enough_held_out_words(vocabulary: TaskVocabulary, corpus: Corpus) -> None:
    values = MappingProxyType(dict(vocabulary.values) | {"held_out": vocabulary.values["held_out"][:5]})
    few, config = replace(vocabulary, values=values), configured(evaluation__tasks=["n_back"])
    check_tasks(config, vocabulary, corpus)
    with pytest.raises(ConfigError, match=r"^evaluation\.tasks: n_back cannot be asked .* must lie in 1 to 5$"):
        check_tasks(config, few, corpus)


def test_rows_of_different_length_are_refused() -> None:
    rows = [Example(np.zeros(length, np.int64), np.zeros(length, np.bool_)) for length in (3, 4)]
    with pytest.raises(ConfigError, match=r"2 lengths cannot be one batch: \[3, 4\]"):
        stack(rows)
