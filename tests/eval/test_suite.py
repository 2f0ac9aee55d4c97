"""The evaluation document: equal for any number of workers, complete, and of the form that the report reads."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cortex_core.backbone.model import Cortex
from cortex_core.config import EvaluationConfig
from cortex_core.eval.reach import recall
from cortex_core.eval.suite import TEXT_ROW_SEGMENTS, Suite, _clock
from cortex_core.intervals import wilson
from pipelines.report import Evaluation
from tests import tiny
from tests.tiny import SEGMENT

ASKED = EvaluationConfig(
    fillers=("text", "random"), gaps_tokens=(70, 0, 33), num_examples=7, batch_size=3,
    perplexity_tokens=6 * TEXT_ROW_SEGMENTS * SEGMENT,
)  # fmt: skip


def suite(config: EvaluationConfig = ASKED, **of_worker: Any) -> Suite:
    return Suite(config, tiny.vocabulary(), tiny.corpus(), tiny.PAIRS, seed=0, **of_worker)


def noisy() -> Cortex:
    return tiny.model(open_gates=True)


class Meeting:
    """What `all_gather_object` does, between threads."""

    def __init__(self, size: int) -> None:
        self._brought: list[Any] = [None] * size
        self._barrier = threading.Barrier(size, timeout=120)

    def gather(self, rank: int) -> Callable[[Any], list[Any]]:
        def gather(mine: Any) -> list[Any]:
            self._brought[rank] = mine
            self._barrier.wait()
            everyone = list(self._brought)
            self._barrier.wait()  # nobody brings the next thing before all have taken this
            return everyone

        return gather


def together(world_size: int, config: EvaluationConfig = ASKED) -> tuple[list[dict[str, Any]], list[list[float]]]:
    """Documents and reports of progress of `world_size` workers, each a thread with a model of its own."""
    meeting, models = Meeting(world_size), [noisy() for _ in range(world_size)]
    documents: list[Any] = [None] * world_size
    told: list[list[float]] = [[] for _ in models]

    def work(rank: int) -> None:
        worker = {
            "rank": rank,
            "world_size": world_size,
            "gather": meeting.gather(rank),
            "on_progress": told[rank].append,
        }
        documents[rank] = suite(config, **worker).run(models[rank])

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert None not in documents
    return documents, told


def without_speed(document: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name not in {"throughput", "drift"}}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """The document of a single worker."""
    return suite().run(noisy())


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_workers_finds_the_same(alone: dict[str, Any], world_size: int) -> None:
    """Seven examples do not divide evenly: shares are padded, and what is padded is not counted."""
    documents, told = together(world_size)
    assert told[0] and told == [told[0]] * world_size, "every call is a report, which Ray Train awaits of every worker"
    for document in documents:
        assert document["rows"] == alone["rows"]
        assert without_speed(document) == without_speed(alone)
        assert document["drift"] == pytest.approx(alone["drift"], rel=1e-6)
        assert document["drift"] == documents[0]["drift"]


def test_rows_are_counts_of_single_answers(alone: dict[str, Any]) -> None:
    model, rows = noisy(), iter(alone["rows"])
    for filler in ("text", "random"):
        found = {hits.gap_tokens: hits for hits in recall(model, tiny.task(filler, "held_out"), (0, 33, 70), range(7))}
        for gap in (0, 33, 70):
            for memory, outcomes in (("on", found[gap].with_memory), ("off", found[gap].bare)):
                low, high, share = wilson(sum(outcomes), 7)
                assert next(rows) == {
                    "task": "key_value", "filler": filler, "gap_tokens": gap, "memory": memory,
                    "accuracy": share, "n": 7, "low": low, "high": high,
                }  # fmt: skip
    assert next(rows, None) is None
    assert {row["accuracy"] for row in alone["rows"]} > {0.0}, "nothing was ever right"


def test_outcomes_are_those_of_the_examples(alone: dict[str, Any]) -> None:
    """In the order of the rows, an example a character: what two runs are compared by."""
    model, outcomes = noisy(), iter(alone["outcomes"])
    for filler in ("text", "random"):
        found = {hits.gap_tokens: hits for hits in recall(model, tiny.task(filler, "held_out"), (0, 33, 70), range(7))}
        for gap, memory in itertools.product((0, 33, 70), ("on", "off")):
            right = found[gap].with_memory if memory == "on" else found[gap].bare
            assert next(outcomes) == "".join(str(int(one)) for one in right)
    assert next(outcomes, None) is None
    assert len({*alone["outcomes"]}) > 1


def test_the_document_is_what_the_report_reads(alone: dict[str, Any]) -> None:
    read = Evaluation.model_validate(alone | {"schema": 1})
    model = noisy()
    assert read.sidecar_parameters == sum(p.numel() for p in model.sidecars.parameters())
    (state,) = model.empty_states(1).values()
    assert read.state_bytes == state.num_bytes > 4 * state.up.numel() and read.window_tokens == SEGMENT
    assert read.chance == {"key_value": 1 / len(tiny.vocabulary().values["held_out"])}
    assert read.usage is not None and [use.layer for use in read.usage] == [1]
    assert read.throughput is not None and read.throughput.tokens_per_s_on and read.throughput.tokens_per_s_off
    assert read.drift is not None and read.drift.n_tokens == ASKED.perplexity_tokens
    assert read.drift.ratio != 1.0


def test_time_on_a_gpu_is_that_of_finished_work(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    gpu = torch.device("cuda", 0)
    assert _clock(torch.device("cpu")) <= _clock(gpu) and waited == [gpu]


def test_an_untrained_memory_does_not_drift() -> None:
    config = ASKED.model_copy(update={"gaps_tokens": (0,), "fillers": ("text",)})
    document = suite(config).run(tiny.model())
    assert document["drift"]["ratio"] == pytest.approx(1.0, abs=1e-6)
    on, off = document["rows"]
    assert on | {"memory": "off"} == off


def test_drift_may_be_left_out() -> None:
    config = ASKED.model_copy(update={"perplexity_tokens": 0, "gaps_tokens": (0,), "fillers": ("text",)})
    assert "drift" not in suite(config).run(tiny.model())


def test_held_out_words_only(alone: dict[str, Any]) -> None:
    """What is asked was never a word of a training task."""
    training = {*tiny.vocabulary().keys["train"].tolist(), *tiny.vocabulary().values["train"].tolist()}
    for task in suite()._tasks():
        for index in range(7):
            told = [token for part in task.sheet(index, 1).facts for token in part.tokens]
            assert not training & set(told)


def test_progress_goes_from_the_start_to_the_end_once() -> None:
    told: list[float] = []
    suite(on_progress=told.append).run(noisy())
    assert told == sorted(told) and 0 < told[0] < 0.2
    assert told[-1] == pytest.approx(1.0) and told.count(told[-1]) == 1
