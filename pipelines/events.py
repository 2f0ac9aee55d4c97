"""What happened to a run, a line each in `events.jsonl` in its folder: when, to which run, what.

The driver alone writes the file. What Ray Train's controller sees comes to it as the reports do, through a mailbox, and
bears the time at which it was seen.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.callback import ReportCallback, WorkerGroupCallback

from pipelines.watch import EVALUATING, Hang

EVENTS_FILE = "events.jsonl"


def event(name: str, **fields: Any) -> dict[str, Any]:
    """Something that has happened just now."""
    return {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": name, **fields}


class EventLog:
    """The file. As a context manager it ends with the event that fits. Never raises because of the disk.

    Nothing is written before `begin`: a command that is refused leaves the folder as it was.
    """

    def __init__(self, folder: Path, run: str, say: Callable[[str], None] | None = None) -> None:
        """`say` prints what no other line of a job's log tells."""
        self._file, self._run, self._say = folder / EVENTS_FILE, run, say
        self._run_id: str | None = None
        self._problems: Sequence[str] = ()
        self._ended = False

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error)

    def begin(self, run_id: str, problems: Sequence[str], *, attempt: int, resumed: bool, step: int | None) -> None:
        """The run is open in MLflow under `run_id`; what MLflow does not take will stand in `problems`. `step` is that
        of the checkpoint from which it goes on, if this machine has one."""
        self._run_id, self._problems = run_id, problems
        if resumed:
            self.write("resumed", attempt=attempt, from_step=step)
        else:
            self.write("started", attempt=attempt)

    def write(self, name: str, **fields: Any) -> None:
        """Something that has happened just now."""
        self.add(event(name, **fields))

    def add(self, happened: Mapping[str, Any]) -> None:
        """Append what `event` has made, here or elsewhere."""
        if self._run_id is None:
            return
        line = {"time": happened["time"], "run": self._run, "mlflow_run_id": self._run_id} | dict(happened)
        try:
            self._append(json.dumps(line))
        except OSError as error:  # a full disk may not stop the training here, nor a folder that is gone
            logging.getLogger(__name__).debug("an event could not be kept: %s", error)
        if self._say is not None and (text := in_words(happened)):
            self._say(text)

    def close(self, error: BaseException | None, *, waits: bool = False) -> None:
        """The run has ended: by itself, with an Exception that made it fail, or with another one, interrupted. Only the
        first end counts. One that ended by itself and `waits` has more steps to take."""
        for problem in self._problems:
            self.write("MLflow incomplete", reason=problem)
        self._problems = ()
        if not self._ended:
            self._ended = True
            if error is None:
                self.write("waiting" if waits else "finished")
            elif isinstance(error, Exception):
                self.write("failed", reason=reason(error))
            else:
                self.write("interrupted")

    def interrupted(self) -> None:
        """Say so at once: stopping the workers takes seconds, which a job that is stopped may not have."""
        self._ended = True
        self.write("interrupted")

    def _append(self, line: str) -> None:
        with self._file.open("a+b") as file:
            cut = file.tell() > 0 and (file.seek(-1, 2), file.read(1))[1] != b"\n"  # by a full disk, or a kill
            file.write(("\n" if cut else "").encode() + line.encode() + b"\n")


class EventCallback(ReportCallback, WorkerGroupCallback):
    """Posts what happens to the workers, and what their reports tell of. Runs on Ray Train's controller, after `Watch`;
    in local mode call its `after_report`."""

    def __init__(self, post: Callable[[dict[str, Any]], None], unsent: Path) -> None:
        """`unsent` is there while metrics wait for MLflow."""
        self._send, self._unsent = post, unsent
        self._waiting = self._evaluating = False
        self._hosts: list[str] = []
        self._lost: dict[int, str] = {}

    def after_execution_group_start(self, execution_group: Any) -> None:
        """Workers have been started: the first, or others in their place."""
        self._hosts = [worker.metadata.hostname for worker in execution_group.get_workers()]
        self._post("workers started", workers=len(self._hosts), hosts=self._hosts)
        for rank, why in self._lost.items():
            if rank < len(self._hosts):
                self._post("worker replaced", rank=rank, host=self._hosts[rank], reason=why)
        self._lost, self._evaluating = {}, False

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Called several times a second."""
        for rank, error in worker_group_status.errors.items():
            if rank in self._lost:
                continue
            place = {"rank": rank, "host": self._hosts[rank] if rank < len(self._hosts) else None}
            self._lost[rank] = reason(error)
            if isinstance(error, Hang):
                self._post("hang found", **place, reason=self._lost[rank])
            self._post("worker lost", **place, reason=self._lost[rank])

    def after_report(self, training_report: Any, metrics: list[dict[str, Any]]) -> None:
        """All workers have reported, and a checkpoint that came with it is kept."""
        report = metrics[0]
        if damaged := int(report.get("damaged_checkpoints", 0)):
            self._post("damaged checkpoint passed over", checkpoints=damaged)
        if report.get("resumed_step"):
            self._post("checkpoint loaded", step=int(report["resumed_step"]))
        if "step" in report and "checkpoint_bytes" in report:
            self._post("checkpoint written", step=int(report["step"]), bytes=int(report["checkpoint_bytes"]))
        if self._unsent.exists() != self._waiting:
            self._waiting = not self._waiting
            self._post("metrics unsent" if self._waiting else "metrics sent", file=str(self._unsent))
        # Its first report comes late: it begins with the end of the training, if there is any left.
        if not self._evaluating and (report.get("phase") == EVALUATING or report.get("done_frac", 0.0) >= 1.0):
            self._evaluating = True
            self._post("evaluation begun")

    def _post(self, name: str, **fields: Any) -> None:
        self._send(event(name, **fields))


def in_words(happened: Mapping[str, Any]) -> str | None:
    """For a job's log; None for what the lines of the progress say."""
    words = IN_WORDS.get(happened["event"])
    without_ray = happened.get("workers") == 0
    return words(happened) if words and not without_ray else None


IN_WORDS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "cluster ready": lambda of: f"cluster ready (nodes: {of['nodes']}, workers to start: {of['workers']})",
    "workers started": lambda of: f"workers started: {of['workers']}, on {', '.join(of['hosts'])}",
    "worker replaced": lambda of: f"worker {of['rank']} replaced, on {of['host']}",
    "checkpoint loaded": lambda of: f"checkpoint of step {of['step']} loaded",
    "checkpoint written": lambda of: f"checkpoint of step {of['step']} written, {of['bytes'] / 1e6:.1f} MB",
    "metrics unsent": lambda of: f"MLflow does not take metrics: they wait in {of['file']}",
    "metrics sent": lambda of: "MLflow takes metrics again",
    "finished": lambda of: "finished",
    "interrupted": lambda of: "interrupted",
    "failed": lambda of: f"failed: {of['reason']}",
}


def reason(error: BaseException) -> str:
    """Of an error with its worker's traceback in it, the part that says what happened."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # Ray's word for a worker that did not answer for ten minutes ends with advice about a variable.
    return lines[0 if isinstance(error, WorkerHealthCheckTimeoutError) else -1][:200]
