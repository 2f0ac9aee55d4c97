from __future__ import annotations

import time

import numpy as np
import pytest

from cortex_core.errors import ConfigError
from cortex_core.tasks import mqar
from cortex_core.tasks.mqar import BLANK, FORGETTING_TEST, FORGETTING_TRAIN, TEST, TRAIN, Mqar

SIZES = [
    *{portion.task for part in (TRAIN, TEST, FORGETTING_TRAIN, FORGETTING_TEST) for portion in part},
    *mqar.FIGURE_2,
]


@pytest.mark.parametrize("task", SIZES, ids=lambda task: f"{task.num_tokens}-{task.num_pairs}-{task.num_updates}")
def test_every_key_is_asked_once_and_answered_with_its_latest_value(task: Mqar) -> None:
    tokens, asked, expected = task.batch(range(5))
    context = task.context_tokens
    assert tokens.shape == asked.shape == expected.shape == (5, task.num_tokens)
    assert context == 2 * (task.num_pairs + task.num_updates)
    for row, where, answers in zip(tokens, asked, expected, strict=True):
        pairs = row[:context].reshape(-1, 2).tolist()
        latest = {key: value for key, value in pairs}  # noqa: C416 - the later pair wins
        assert len(latest) == task.num_pairs
        first = dict(pairs[: task.num_pairs])
        assert len(set(first.values())) == task.num_pairs, "values are distinct"
        assert sum(first[key] != latest[key] for key in first) == task.num_updates, "an update changes the value"
        assert all(1 <= key < 4096 <= value < 8192 for key, value in pairs)
        assert not where[:context].any()
        places = np.flatnonzero(where)
        assert ((places - context) % 2 == 0).all()
        assert sorted(row[places]) == sorted(latest)
        assert answers[places].tolist() == [latest[key] for key in row[places].tolist()]
        assert (answers[~where] == -1).all()


def test_blanks_stay_blank_or_become_any_token() -> None:
    blank = Mqar(64, 4, random_non_queries=False).batch(range(50))
    assert (blank.tokens[:, 8:][~blank.asked[:, 8:]] == BLANK).all()
    noisy = Mqar(64, 4).batch(range(200))
    rest = noisy.tokens[:, 8:][~noisy.asked[:, 8:]]
    counts, _ = np.histogram(rest, 8, (0, 8192))
    assert counts.min() > 0.8 * len(rest) / 8, "uniform over the vocabulary"
    assert (np.diff(np.sort(noisy.tokens[:, :8], axis=1), axis=1) > 0).all()


def test_questions_come_close_by_a_power_law() -> None:
    task = Mqar(256, 1, power_a=0.01)
    batch = task.batch(range(4000))
    slots = (batch.asked.argmax(axis=1) - 2) // 2
    expected = task.slot_probabilities()
    assert expected[0] / expected[9] == pytest.approx(10**0.99)
    found = np.bincount(slots, minlength=127) / 4000
    assert np.abs(found - expected).max() < 0.02
    even = Mqar(256, 1, power_a=1.0)
    assert even.slot_probabilities() == pytest.approx(1 / 127)
    assert (even.batch(range(1000)).asked.argmax(axis=1) > 128).mean() == pytest.approx(0.5, abs=0.06)


def test_the_order_of_the_questions_is_not_that_of_the_pairs() -> None:
    batch = Mqar(64, 8, random_non_queries=False).batch(range(100))
    first = [row[where].tolist().index(row[0]) for row, where in zip(batch.tokens, batch.asked, strict=True)]
    assert set(first) == set(range(8))


def test_updates_stand_after_all_pairs_and_take_any_key() -> None:
    batch = Mqar(64, 4, num_updates=2).batch(range(100))
    updated = set()
    for row in batch.tokens:
        keys = row[:12:2].tolist()
        assert len(set(keys[:4])) == 4
        updated |= {keys[:4].index(key) for key in keys[4:]}
        assert len(set(keys[4:])) == 2
    assert updated == {0, 1, 2, 3}


def test_a_sequence_depends_on_seed_split_and_index_alone() -> None:
    task = Mqar(64, 4)
    whole, part = task.batch(range(8)), task.batch([5, 2])
    assert np.array_equal(part.tokens, whole.tokens[[5, 2]])
    assert np.array_equal(part.expected, whole.expected[[5, 2]])
    for other in (task.batch(range(8), seed=1), task.batch(range(8), split="held_out"), task.batch(range(8, 16))):
        assert (other.tokens[:, :8] != whole.tokens[:, :8]).any(axis=1).all()


def test_the_published_sizes() -> None:
    def table(portions: tuple[mqar.Portion, ...]) -> list[tuple[int, int, int]]:
        return [(portion.num_sequences, portion.task.num_tokens, portion.task.num_pairs) for portion in portions]

    assert table(TRAIN)[0] == (100_000, 64, 4) and sum(count for count, *_ in table(TRAIN)) == 180_000
    assert [size[1:] for size in table(TRAIN)[1:]] == [(128, 8), (256, 16), (256, 32), (256, 64)]
    assert [size[1:] for size in table(TEST)] == [
        (64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256),
    ]  # fmt: skip
    assert {count for count, *_ in table(TEST) + table(FORGETTING_TEST)} == {1000}
    assert [size[1:] for size in table(FORGETTING_TRAIN)] == [(64, 4), (128, 9), (256, 16), (256, 25), (256, 36)]
    assert table(FORGETTING_TEST)[-1] == (1000, 2048, 256)
    assert {portion.task.num_updates for portion in FORGETTING_TRAIN + FORGETTING_TEST} == {4}
    assert {portion.task.num_updates for portion in TRAIN + TEST} == {0}
    assert all(task.power_a == 0.01 and task.vocab_size == 8192 for task in SIZES)
    assert TRAIN[0].task.random_non_queries and not mqar.FIGURE_2[0].random_non_queries
    assert TRAIN[0].task.chance() == 1 / 4096


def test_a_training_set_is_made_in_seconds() -> None:
    start = time.process_time()
    TRAIN[0].task.batch(range(2000))
    assert time.process_time() - start < 5.0


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ({"num_tokens": 14, "num_pairs": 4}, "num_tokens = 14 must be even and at least 16 for 4 pairs and 0 updates"),
        ({"num_tokens": 65, "num_pairs": 4}, "num_tokens = 65 must be even"),
        ({"num_tokens": 16, "num_pairs": 4, "num_updates": 1}, "at least 18 for 4 pairs and 1 updates"),
        ({"num_tokens": 64, "num_pairs": 4, "num_updates": 5}, "num_updates = 5 in 0 to num_pairs"),
        ({"num_tokens": 64, "num_pairs": 0}, "num_pairs = 0 must be at least 1"),
        ({"num_tokens": 64, "num_pairs": 8, "vocab_size": 17}, "vocab_size = 17 must be at least 18 for 8 pairs"),
        ({"num_tokens": 64, "num_pairs": 4, "power_a": 0.0}, "power_a = 0.0 must be above 0"),
    ],
)
def test_what_cannot_be_made_is_refused(sizes: dict[str, float], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        Mqar(**sizes)  # type: ignore[arg-type]


def test_the_smallest_vocabulary_is_enough() -> None:
    batch = Mqar(32, 8, vocab_size=18).batch(range(20))
    assert all(set(row[:16:2].tolist()) == set(range(1, 9)) for row in batch.tokens)
