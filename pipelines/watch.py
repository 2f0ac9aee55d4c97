"""Notices that training stands still, and says which worker is at fault.

One worker that hangs stops all of them: the others wait for it in their next collective operation, for half an hour
before the process group gives up, and then it is they who fail. So Ray Train's controller looks for reports, and when
they stay away asks every worker how far it is.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch.distributed as dist
from ray.exceptions import RayError
from ray.train import UserCallback
from ray.train.v2._internal.execution.callback import ReportCallback, WorkerGroupCallback

ANSWER_TIMEOUT_S = 5.0
TRAINING, EVALUATING = 1.0, 2.0
"""The number `phase` of a report between two training steps, and of one of the evaluation."""


class Hang(TimeoutError):
    """What a worker is ended with that stands still."""


class Position(NamedTuple):
    """How far a worker is."""

    collectives: int
    """Collective operations that it has begun. The one that the others wait for has begun fewer."""
    line: str
    """What its training thread is doing."""


class Watch(ReportCallback, WorkerGroupCallback):
    """On Ray Train's controller. Between two reports of training steps no more than `timeout_s` may pass; then the
    worker at fault is ended and fails with a Hang, which `heard_by` hear of and Ray Train answers as any
    other failure. Loading, the first step of each start and the evaluation are not watched: how long they may take,
    nobody knows."""

    def __init__(self, timeout_s: float, heard_by: Sequence[UserCallback]) -> None:
        self._timeout_s, self._heard_by = timeout_s, heard_by
        self._workers: list[Any] = []
        self._since: float | None = None

    def after_execution_group_start(self, execution_group: Any) -> None:
        """Workers have been started: they load."""
        self._workers, self._since = execution_group.get_workers(), None

    def after_report(self, training_report: Any, metrics: list[dict[str, Any]]) -> None:
        """All workers have reported."""
        more_steps = metrics[0].get("phase") == TRAINING and metrics[0].get("done_frac", 0.0) < 1.0
        self._since = time.monotonic() if more_steps else None

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Called several times a second, after what was reported meanwhile has been taken in."""
        if worker_group_status.errors or self._since is None or time.monotonic() - self._since <= self._timeout_s:
            return
        self._since = None
        positions = _ask(self._workers)
        for rank in at_fault(positions):
            error = Hang(self._describe(rank, positions))
            worker_group_status.worker_statuses[rank].error = error
            for callback in self._heard_by:
                callback.after_exception(None, {rank: error})  # type: ignore[arg-type]
            ray.kill(self._workers[rank].actor)  # or it, and those who wait for it, would hold up the next start

    def _describe(self, rank: int, positions: list[Position | None]) -> str:
        node, position = self._workers[rank].metadata, positions[rank]
        state = "does not answer" if position is None else f"hangs in {position.line}"
        place = f"{node.hostname} ({node.node_ip}, process {node.pid})"
        return f"{state} on {place}: no step for {self._timeout_s:g} s (cluster.hang_timeout_s)"


def at_fault(positions: Sequence[Position | None]) -> list[int]:
    """Ranks of the workers that do not answer; if all do, of those that are behind. Never empty: where none is behind
    another, it is all of them."""
    silent = [rank for rank, position in enumerate(positions) if position is None]
    least = min((position.collectives for position in positions if position is not None), default=0)
    return silent or [rank for rank, position in enumerate(positions) if position and position.collectives == least]


def here() -> Position:
    """Of this process. Its training runs in a thread beside the one that answers."""
    group = dist.group.WORLD if dist.is_initialized() else None
    stacks = [traceback.extract_stack(frame) for frame in sys._current_frames().values()]
    training = next((stack for stack in stacks if "on_worker" in {call.name for call in stack}), None)
    line = f"{training[-1].name} ({Path(training[-1].filename).name}:{training[-1].lineno})" if training else "nothing"
    return Position(0 if group is None else group._get_sequence_number_for_group(), line)  # type: ignore[attr-defined]


def _ask(workers: Sequence[Any]) -> list[Position | None]:
    """Where each is, None for those that do not answer."""
    answers = [worker.execute_async(here) for worker in workers]
    done, _ = ray.wait(answers, num_returns=len(answers), timeout=ANSWER_TIMEOUT_S)
    return [_position(answer) if answer in done else None for answer in answers]


def _position(answer: Any) -> Position | None:
    try:
        return ray.get(answer)
    except RayError:  # it has died meanwhile
        return None
