from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from cortex_core.config import TasksConfig
from cortex_core.errors import ConfigError
from cortex_core.tasks.corpus import Corpus
from cortex_core.tasks.layout import Example
from cortex_core.tasks.mixture import Mixture, build_task, stack
from cortex_core.tasks.vocabulary import TaskVocabulary

EVERYTHING = TasksConfig(names=("key_value", "copy_reverse", "n_back", "long_addition", "corpus"), num_pairs=4)


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


def test_text_asks_nothing_and_opens_no_document(vocabulary: TaskVocabulary, corpus: Corpus) -> None:
    task = build_task("corpus", "text", vocabulary, corpus)
    for example in (task.example(0, 50), task.in_window_example(0, 50), task.spanning_example(0, 50)):
        assert example.tokens.shape == (50,)
        assert not example.answer.any()
        assert set(example.tokens) <= set(corpus.train.tolist())
        assert np.array_equal(example.tokens, corpus.excerpt((0, 0, 0, 7), 50, "train"))


def test_held_out_words_never_occur_in_a_training_task(vocabulary: TaskVocabulary, corpus: Corpus) -> None:
    held_out = set(vocabulary.held_out_words())
    for name in ("key_value", "n_back"):
        train, test = (build_task(name, "random", vocabulary, corpus, split=split) for split in ("train", "held_out"))
        for index in range(40):
            content = [token for part in train.sheet(index, 6).facts for token in part.tokens]
            assert not held_out & set(content)
        asked = {token for part in test.sheet(0, 6).facts for token in part.tokens}
        assert held_out & asked


def test_rows_of_different_length_are_refused() -> None:
    rows = [Example(np.zeros(length, np.int64), np.zeros(length, np.bool_)) for length in (3, 4)]
    with pytest.raises(ConfigError, match=r"2 lengths cannot be one batch: \[3, 4\]"):
        stack(rows)
