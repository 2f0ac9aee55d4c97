"""Which worker is at fault when training stands still, and when nobody is asked."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus
from ray.train.v2._internal.execution.worker_group.poll import WorkerStatus

from pipelines import cluster, watch
from pipelines.config import ClusterConfig
from pipelines.progress import ProgressCallback, run_to_end
from pipelines.watch import Position, Watch, at_fault


def behind(collectives: int) -> Position:
    return Position(collectives, "recv (socket.py:7)")


@pytest.mark.parametrize(
    ("positions", "ranks"),
    [
        ([behind(7), behind(6), behind(7)], [1]),
        ([behind(6), behind(6), behind(7)], [0, 1]),
        ([behind(7), None, behind(6)], [1]),  # what does not answer cannot be asked how far it is
        ([behind(7), behind(7)], [0, 1]),
        ([behind(0)], [0]),
        ([None, None], [0, 1]),
    ],
)
def test_at_fault_is_who_does_not_answer_or_is_behind(positions: list[Position | None], ranks: list[int]) -> None:
    assert at_fault(positions) == ranks


class Workers:
    """Two workers, of which the second is behind, a watch over them, and a clock that is told the time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.killed = 0.0, []
        self.heard: list[dict[int, Exception]] = []
        monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(watch.ray, "kill", self.killed.append)
        monkeypatch.setattr(watch.ray, "wait", self._wait)
        monkeypatch.setattr(watch.ray, "get", lambda rank: behind(9 - rank))
        hears = SimpleNamespace(after_exception=lambda context, errors: self.heard.append(errors))
        self.watch = Watch(60.0, [hears])  # type: ignore[list-item]
        self.group = [self._worker(0), self._worker(1)]
        self.watch.after_execution_group_start(SimpleNamespace(get_workers=lambda: self.group))

    def _worker(self, rank: int) -> Any:
        node = SimpleNamespace(hostname=f"node-{rank}", node_ip=f"10.0.0.{rank}", pid=100 + rank)
        return SimpleNamespace(actor=rank, metadata=node, execute_async=lambda ask: rank)

    def _wait(self, ranks: list[int], num_returns: int, timeout: float) -> tuple[list[int], list[int]]:
        silent = [1] if self.now > 1000 else []
        return [rank for rank in ranks if rank not in silent], silent

    def report(self, **metrics: float) -> None:
        self.watch.after_report(None, [metrics, metrics])

    def poll(self, error: Exception | None = None) -> dict[int, Exception]:
        status = WorkerGroupPollStatus({0: WorkerStatus(running=True), 1: WorkerStatus(running=True, error=error)})
        self.watch.after_worker_group_poll_status(status)
        return status.errors


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    return Workers(monkeypatch)


def test_the_worker_that_is_behind_is_named_with_its_node_and_ended(workers: Workers) -> None:
    workers.report(phase=1.0, step=3, done_frac=0.3)
    workers.now = 60.0
    assert workers.poll() == {}
    workers.now = 60.5
    errors = workers.poll()
    assert [*errors] == workers.killed == [1] and workers.heard == [errors] and isinstance(errors[1], TimeoutError)
    assert str(errors[1]) == (
        "hangs in recv (socket.py:7) on node-1 (10.0.0.1, process 101): no step for 60 s (cluster.hang_timeout_s)"
    )
    workers.now = 200.0
    assert workers.poll() == {}, "once is enough: others start, and load"


def test_a_worker_that_does_not_answer_is_named(workers: Workers) -> None:
    workers.report(phase=1.0, step=3, done_frac=0.3)
    workers.now = 1001.0
    assert str(workers.poll()[1]).startswith("does not answer on node-1 (10.0.0.1, process 101): ")


def test_every_report_of_training_starts_the_clock_anew(workers: Workers) -> None:
    for step in range(1, 9):
        workers.report(phase=1.0, step=step, done_frac=step / 10)
        workers.now += 50.0
        assert workers.poll() == {}


@pytest.mark.parametrize(
    "last",
    [
        None,
        {"phase": 0.0},
        {"phase": 0.0, "damaged_checkpoints": 1.0, "resumed_step": 4.0},
        {"phase": 1.0, "step": 10, "done_frac": 1.0},
        {"phase": 2.0, "evaluated_frac": 0.5},
        {"phase": 3.0, "step": 10},
    ],
    ids=["starting", "loading", "resuming", "after the last step", "evaluating", "at the end"],
)
def test_nothing_else_is_watched(workers: Workers, last: dict[str, float] | None) -> None:
    if last is not None:
        workers.report(phase=1.0, step=9, done_frac=0.9)
        workers.report(**last)
    workers.now = 10_000.0
    assert workers.poll() == {} and not workers.killed


def test_workers_that_have_just_been_replaced_are_left_alone(workers: Workers) -> None:
    workers.report(phase=1.0, step=3, done_frac=0.3)
    workers.watch.after_execution_group_start(SimpleNamespace(get_workers=lambda: workers.group))
    workers.now = 10_000.0
    assert workers.poll() == {}


def test_a_failure_that_is_known_is_enough(workers: Workers) -> None:
    workers.report(phase=1.0, step=3, done_frac=0.3)
    workers.now = 10_000.0
    assert [*workers.poll(ValueError("known"))] == [1] and not workers.killed


@pytest.mark.slow
def test_a_worker_that_is_stuck_while_the_others_wait_for_it_is_found(tmp_path: Path, ray_here: ClusterConfig) -> None:
    """It still answers, and so do they: what tells them apart is how often they have met."""

    def on_worker(settings: dict[str, Any]) -> None:
        import threading

        import torch
        import torch.distributed as dist

        once = settings["once"]
        for step in range(1, 4):
            if step == 2 and ray.train.get_context().get_world_rank() == 0 and not once.exists():
                once.touch()
                threading.Event().wait()
            dist.all_reduce(torch.ones(2))
            ray.train.report({"phase": 1.0, "step": step, "done_frac": step / 3})

    def post(item: dict[str, Any]) -> None:
        with (tmp_path / "heard").open("a") as file:
            file.write(item.get("failure", ""))

    workers, progress = ray_here.model_copy(update={"num_workers": 2}), ProgressCallback(SimpleNamespace(post=post))
    trainer = TorchTrainer(
        on_worker, train_loop_config={"once": tmp_path / "once"}, scaling_config=cluster.scaling(workers),
        run_config=ray.train.RunConfig(
            name="run", storage_path=str(tmp_path), failure_config=cluster.failure(workers),
            callbacks=[progress, Watch(3.0, [progress])],  # type: ignore[list-item]
        ),
    )  # fmt: skip
    run_to_end(trainer)
    assert re.fullmatch(
        r"worker 0 failed: hangs in wait \(threading.py:\d+\) on \S+ \(\S+, process \d+\): no step for 3 s .*",
        (tmp_path / "heard").read_text(),
    )
