"""Batches are a function of seed and step: any number of workers and micro-batches reads the same rows in the same order."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from cortex_core.config import TasksConfig
from cortex_core.training.batches import BatchSource
from cortex_core.training.objectives import Batch
from tests import tiny
from tests.tiny import SEGMENT


def source(seed: int = 0, **training: object) -> BatchSource:
    settings = {"batch_size": 8, "in_window_batch_size": 8, "filler_windows": 2} | training
    return tiny.batches(tiny.training(**settings), seed=seed)


def equal(one: Batch, other: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def whole(of: BatchSource, step: int) -> Batch:
    """The global batch, as one worker without accumulation gets it."""
    training = of.training.model_copy(update={"accumulation_steps": 1})
    (batch,) = dataclasses.replace(of, training=training).micro_batches(step, 0, 1)
    return batch


def test_a_step_is_always_the_same_batch() -> None:
    first, again, other_seed = source(), source(), source(seed=1)
    for step in (0, 3, 5):
        assert equal(whole(first, step), whole(again, step))
        assert not torch.equal(whole(first, step).in_window_ids, whole(other_seed, step).in_window_ids)
    assert not torch.equal(whole(first, 5).filler_ids, whole(other_seed, 5).filler_ids)
    later, earlier = whole(first, 4), whole(first, 2)  # in any order
    assert equal(later, whole(again, 4)) and equal(earlier, whole(again, 2))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_all_workers_together_read_the_global_batch(workers: int, accumulation: int) -> None:
    of = source(accumulation_steps=accumulation)
    for step in (0, 2, 5):
        parts = [part for rank in range(workers) for part in of.micro_batches(step, rank, workers)]
        assert len(parts) == workers * accumulation
        assert {len(part.input_ids) for part in parts} == {8 // len(parts)}
        joined = Batch(*(torch.cat(column) for column in zip(*parts, strict=True)))
        assert equal(joined, whole(of, step))


def test_no_row_is_read_twice() -> None:
    of = source(steps=12, short_frac=0.0, max_segments=2)
    read = [whole(of, step) for step in range(12)]
    for ids, answer in (("input_ids", "answer"), ("in_window_ids", "in_window_answer")):
        rows = [
            tuple(row.flatten().tolist())
            for batch in read
            for row, asked in zip(getattr(batch, ids), getattr(batch, answer), strict=True)
            if asked.any()  # plain text may come again: this corpus is small
        ]
        assert len(set(rows)) == len(rows) > 30


def test_the_curriculum_widens_then_lengthens() -> None:
    of = source(steps=100, short_frac=0.4, max_segments=5)
    assert {of.shape(step) for step in range(20)} == {(2, 24)}  # a quarter would be 8, facts and questions need 24
    assert {of.shape(step) for step in range(20, 40)} == {(2, 24)}
    wide = dataclasses.replace(of, narrowest=1)
    assert {wide.shape(step) for step in range(20)} == {(2, SEGMENT // 4)}
    assert {wide.shape(step) for step in range(20, 40)} == {(2, SEGMENT // 2)}
    for each in (of, wide):
        long = [each.shape(step) for step in range(40, 100)]
        assert {width for _, width in long} == {SEGMENT}
        assert {segments for segments, _ in long} == {2, 3, 4, 5}
    assert [of.shape(step) for step in range(100)] == [of.shape(step) for step in range(100)]
    other = dataclasses.replace(of, seed=1)
    assert [other.shape(step) for step in range(100)] != [of.shape(step) for step in range(100)]


def test_numbers_are_short_while_segments_are_narrow() -> None:
    tasks = TasksConfig(names=("copy_reverse",), num_queries=1)
    of = tiny.batches(tiny.training(steps=10, short_frac=0.4, max_segments=4), tasks)
    asked = [whole(of, step).answer.flatten(1).sum(1).unique().tolist() for step in range(10)]
    assert asked[:4] == [[2 * 4]] * 4  # a letter and a digit each: 24 tokens have room for four
    assert asked[4:] == [[2 * 12]] * 6


def test_the_curriculum_may_be_left_out() -> None:
    of = source(steps=10, short_frac=0.0, max_segments=2)
    assert {of.shape(step) for step in range(10)} == {(2, SEGMENT)}


def test_no_segment_is_wider_than_the_window() -> None:
    """Tasks that need more than half of a segment start with whole ones."""
    of = dataclasses.replace(source(steps=10, short_frac=1.0), narrowest=SEGMENT + 8)
    assert {of.shape(step) for step in range(10)} == {(2, SEGMENT)}


@pytest.mark.parametrize("windows", [0, 4])
def test_tokens_are_those_that_all_workers_read(windows: int) -> None:
    of = tiny.batches(
        tiny.training(
            steps=6, batch_size=4, in_window_batch_size=windows, max_segments=4, accumulation_steps=2,
            filler_windows=windows,
        )
    )  # fmt: skip
    for step in range(6):
        parts = [part for rank in range(2) for part in of.micro_batches(step, rank, 2)]
        twice = sum(part.in_window_ids.numel() + part.filler_ids.numel() for part in parts)
        read = sum(part.input_ids.numel() for part in parts) + 2 * twice
        assert of.tokens(step) == read


def test_batches_have_the_shape_of_their_step_and_ask_in_the_last_segment() -> None:
    of = source(steps=6, max_segments=4)
    shapes = []
    for step in range(6):
        batch = whole(of, step)
        shapes.append(batch.input_ids.shape)
        assert batch.input_ids.shape == batch.answer.shape == (8, *of.shape(step))
        assert batch.in_window_ids.shape == batch.in_window_answer.shape == (8, SEGMENT)
        asked = batch.answer.sum(dim=(1, 2))
        assert asked.tolist() == [of.tasks.num_queries] * 8
        assert not batch.answer[:, :-1].any(), "a question before the last segment"
        assert not batch.answer[:, 0, 0].any() and not batch.in_window_answer[:, 0].any()
    assert len(set(shapes)) > 1


def test_windows_hold_facts_or_text_alone() -> None:
    of = source()
    asked = torch.cat([whole(of, step).in_window_answer.sum(1) for step in range(6)])
    assert set(asked.tolist()) == {0, of.tasks.num_queries}


def test_without_windows_there_is_an_empty_batch_of_them() -> None:
    (batch,) = tiny.batches(tiny.training(in_window_batch_size=0)).micro_batches(0, 0, 1)
    assert batch.in_window_ids.shape == batch.in_window_answer.shape == (0, SEGMENT)
    assert batch.in_window_ids.dtype == torch.int64 and batch.in_window_answer.dtype == torch.bool


def test_every_task_and_filler_takes_part() -> None:
    tasks = TasksConfig(names=("key_value", "n_back"), num_pairs=2, num_queries=2, any_token_frac=0.0)
    of = tiny.batches(tiny.training(batch_size=8, steps=6), tasks)
    markers = {name: tiny.vocabulary().pieces[name][0] for name in (" remember", " items")}
    found = dict.fromkeys(markers, 0)
    for step, (name, token) in itertools.product(range(2, 6), markers.items()):
        found[name] += int((whole(of, step).input_ids == token).any(dim=(1, 2)).sum())
    assert min(found.values()) > 8


def test_write_noise_is_the_share_of_forced_tokens() -> None:
    assert not whole(source(write_noise=0.0), 5).forced.any()
    noisy = torch.cat([whole(source(write_noise=0.05), step).forced.flatten() for step in range(6)]).float()
    assert noisy.numel() > 2000 and noisy.mean().item() == pytest.approx(0.05, abs=0.02)
    other = whole(source(seed=1, write_noise=0.05), 5).forced
    assert not torch.equal(whole(source(write_noise=0.05), 5).forced, other)


def test_filler_windows_hold_each_kind_of_filler_and_never_a_fact() -> None:
    of = source(filler_windows=3, sparsity_span=(0.0, 0.0))
    found = torch.cat([whole(of, step).filler_ids for step in range(6)])
    assert found.shape == (6 * 3 * 8, SEGMENT) and len({tuple(row) for row in found.tolist()}) > 100
    assert not (found == tiny.vocabulary().pieces[" remember"][0]).any()
    alone = {name: tiny.TASKS.model_copy(update={"fillers": (name,)}) for name in ("text", "random")}
    kinds = {}
    for name, tasks in alone.items():
        (batch,) = tiny.batches(tiny.training(filler_windows=8, sparsity_span=(0.0, 0.0)), tasks).micro_batches(0, 0, 1)
        kinds[name] = batch.filler_ids.flatten().unique().numel()
    assert kinds["random"] > 1.2 * kinds["text"], "random tokens are of more kinds than text"


def test_text_that_is_to_be_remembered_is_no_filler() -> None:
    tasks = tiny.TASKS.model_copy(update={"names": ("corpus",)})
    of = tiny.batches(tiny.training(filler_windows=4), tasks)
    (batch,) = of.micro_batches(5, 0, 1)
    assert batch.filler_ids.shape == (0, SEGMENT) and batch.filler_ids.dtype == torch.int64
    assert of.tokens(5) == batch.input_ids.numel()


def test_filler_windows_wait_for_the_write_penalty() -> None:
    """Before, no gate may be pushed shut: it would never find what is worth writing."""
    of = source(steps=10, sparsity_span=(0.3, 0.5))
    found = [len(whole(of, step).filler_ids) for step in range(10)]
    assert found == [0] * 4 + [16] * 6  # at step 3 the penalty is still 0
    assert of.tokens(4) - of.tokens(3) >= 2 * 16 * SEGMENT
    assert not len(whole(source(steps=10, sparsity_weight=0.0), 9).filler_ids)
