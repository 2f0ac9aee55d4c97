"""Metrics reach a real SQLite store once each, and survive its absence."""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines import metric_log
from pipelines.metric_log import MetricLog, absolute, first_line, open_client

Lock = Callable[[str], AbstractContextManager[None]]


class Store:
    """A database with one run, and logs that write to it."""

    def __init__(self, folder: Path) -> None:
        self.uri, self.unsent = f"sqlite:///{folder}/mlflow.db", folder / "unsent.jsonl"
        self.client = open_client(self.uri)
        self.run_id = self.client.create_run("0").info.run_id

    def log(self) -> MetricLog:
        return MetricLog(self.uri, self.run_id, self.unsent)

    def steps(self, metric: str = "loss") -> list[tuple[int, float]]:
        return [(point.step, point.value) for point in self.client.get_metric_history(self.run_id, metric)]


@pytest.fixture
def store(tmp_path: Path, mlflow_database: Callable[[Path], None]) -> Store:
    mlflow_database(tmp_path)
    return Store(tmp_path)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that does not answer is given up at once, and not tried again soon."""
    monkeypatch.setattr(metric_log, "ANSWER_TIMEOUT_S", 0.05)


def test_a_step_is_written_once_whoever_repeats_it(store: Store) -> None:
    log = store.log()
    for step in (1, 2, 3, 2, 3, 4):
        log.write({"loss": step}, step)
    for other in (store.log(), pickle.loads(pickle.dumps(log))):
        other.write({"loss": 9.0, "accuracy": 0.5}, 4)
    assert store.steps() == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert store.steps("accuracy") == [(4, 0.5)]


def test_steps_only_go_up(store: Store) -> None:
    log = store.log()
    for step in (1, 4, 2, 3, 5):
        log.write({"loss": step}, step)
    assert [step for step, _ in store.steps()] == [1, 4, 5]


@pytest.mark.usefixtures("impatient")
def test_an_absence_stops_nothing_and_loses_nothing(store: Store, locked: Lock) -> None:
    log = store.log()
    log.write({"loss": 1.0}, 1)
    with locked(store.uri):
        for step, value in ((2, 2.0), (3, 3.0), (2, 2.5)):  # 2 is repeated while the store is away
            log.write({"loss": value}, step)
        kept = [json.loads(line) for line in store.unsent.read_text().splitlines()]
        assert [(row["step"], row["value"]) for row in kept] == [(2, 2.0), (3, 3.0)]
        assert log.flush() == 2
    assert store.steps() == [(1, 1.0)]
    log.write({"loss": 4.0}, 4)
    assert store.steps() == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert not store.unsent.exists()


@pytest.mark.usefixtures("impatient")
def test_the_next_one_sends_what_was_left(store: Store, locked: Lock) -> None:
    with locked(store.uri):
        store.log().write({"loss": 5.0}, 5)
    assert store.log().flush() == 0
    assert store.steps() == [(5, 5.0)] and not store.unsent.exists()


@pytest.mark.usefixtures("brief")
def test_a_process_that_ends_before_the_store_is_back_loses_nothing(store: Store, locked: Lock) -> None:
    """Ray Train's controller is gone when training ends, and what it had in memory with it."""
    log = store.log()
    with locked(store.uri):
        for step in (1, 2, 3, 3):  # tried once; then the log waits before it tries again
            log.write({"loss": step}, step)
    del log
    assert store.log().flush() == 0
    assert store.steps() == [(1, 1.0), (2, 2.0), (3, 3.0)]


@pytest.mark.usefixtures("brief")
def test_a_run_does_not_take_up_what_another_has_left(store: Store, locked: Lock) -> None:
    other = MetricLog(store.uri, store.client.create_run("0").info.run_id, store.unsent)
    with locked(store.uri):
        other.write({"loss": 9.0}, 9)
    log = store.log()
    log.write({"loss": 1.0}, 1)
    assert store.steps() == [(1, 1.0)]


def test_damaged_lines_of_leftovers_are_passed_over(store: Store) -> None:
    whole = {"run": store.run_id, "metric": "accuracy", "step": 1, "value": 0.5, "time_ms": 1}
    store.unsent.write_text(f'{json.dumps(whole)}\n{{"metric": "loss", "st')
    log = store.log()
    log.write({"loss": 1.0}, 1)
    assert store.steps() == [(1, 1.0)] and store.steps("accuracy") == [(1, 0.5)]


def test_the_caller_does_not_wait_each_time(store: Store, locked: Lock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metric_log, "ANSWER_TIMEOUT_S", 0.2)
    log = store.log()
    with locked(store.uri):
        started = time.monotonic()
        for step in range(100):
            log.write({"loss": 0.0}, step)
        assert time.monotonic() - started < 1.0, "every report waited for the store"
    assert log.flush() == 0 and len(store.steps()) == 100


def test_more_than_one_call_takes_are_sent_in_order(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metric_log, "MAX_METRICS_PER_CALL", 3)
    log = store.log()
    log._retry_at = time.monotonic() + 60
    for step in range(5):
        log.write({"loss": step, "accuracy": step}, step)
    assert store.steps() == [] and log.flush() == 0
    assert store.steps() == store.steps("accuracy") == [(step, float(step)) for step in range(5)]


def test_scalars_of_other_libraries_are_numbers(store: Store) -> None:
    log = store.log()
    odd = {"d": torch.ones(2), "e": None, "f": "text", "g": np.zeros(0)}
    log.write({"a": torch.tensor(1.5), "b": np.float32(2.5), "c": True, "nan": float("nan"), **odd}, 1)
    metrics = store.client.get_run(store.run_id).data.metrics
    assert set(metrics) == {"a", "b", "c", "nan"}
    assert (metrics["a"], metrics["b"], metrics["c"]) == (1.5, 2.5, 1.0)


def test_addresses_and_messages_are_made_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("sqlite:///runs/mlflow.db") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert absolute("sqlite:////data/mlflow.db") == "sqlite:////data/mlflow.db"
    assert absolute("http://tracker:5000") == "http://tracker:5000"
    assert first_line(ValueError("\nfirst\nsecond")) == "first" and first_line(OSError()) == "OSError"
