"""What happened to a run: the lines, what stands in for the disk that fails, and what the controller sees."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus
from ray.train.v2._internal.execution.worker_group.poll import WorkerStatus

from pipelines.events import EVENTS_FILE, IN_WORDS, EventCallback, EventLog, event
from pipelines.mailbox import Mailbox
from pipelines.progress import ProgressCallback
from pipelines.watch import Hang

ROOT = Path(__file__).parents[2]


def opened(folder: Path, problems: tuple[str, ...] = (), **more: Any) -> EventLog:
    log = EventLog(folder, "mine", **more)
    log.begin("abc", problems, attempt=0, resumed=False, step=None)
    return log


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / EVENTS_FILE).read_text().splitlines()]


def names(folder: Path) -> list[str]:
    return [row["event"] for row in rows(folder)]


def test_a_line_says_when_to_which_run_and_what(tmp_path: Path) -> None:
    opened(tmp_path).write("cluster ready", workers=2, nodes=3)
    before, row = rows(tmp_path)
    assert before["event"] == "started" and before["time"] <= row.pop("time") and before["time"].endswith("+00:00")
    assert row == {"run": "mine", "mlflow_run_id": "abc", "event": "cluster ready", "workers": 2, "nodes": 3}


def test_what_was_seen_elsewhere_keeps_its_time(tmp_path: Path) -> None:
    opened(tmp_path).add({"time": "2026-01-01T00:00:00.000+00:00", "event": "workers started", "hosts": ["a"]})
    assert rows(tmp_path)[-1]["time"] == "2026-01-01T00:00:00.000+00:00"


def test_before_a_run_is_open_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="refused"), EventLog(tmp_path, "mine"):
        raise ValueError("refused")
    assert not (tmp_path / EVENTS_FILE).exists()


@pytest.mark.parametrize(
    ("error", "end"),
    [(None, "finished"), (KeyboardInterrupt(), "interrupted"), (ValueError("Traceback:\n  x\nit broke"), "failed")],
)
def test_the_end_is_said_once(tmp_path: Path, error: BaseException | None, end: str) -> None:
    log = opened(tmp_path)
    log.close(error)
    log.close(None)
    assert names(tmp_path) == ["started", end]
    assert rows(tmp_path)[-1].get("reason") == ("it broke" if end == "failed" else None)


def test_an_interrupt_is_said_before_the_workers_have_stopped(tmp_path: Path) -> None:
    log = opened(tmp_path, ("3 metric values did not reach MLflow",))
    log.interrupted()
    assert names(tmp_path)[-1] == "interrupted"
    log.close(KeyboardInterrupt())
    assert names(tmp_path) == ["started", "interrupted", "MLflow incomplete"]


def test_the_next_part_of_a_run_goes_on_below(tmp_path: Path) -> None:
    opened(tmp_path).close(KeyboardInterrupt())
    with (tmp_path / EVENTS_FILE).open("a") as file:
        file.write('{"time": "20')  # the disk was full, or the process was killed
    log = EventLog(tmp_path, "mine")
    log.begin("abc", (), attempt=0, resumed=True, step=40)
    lines = (tmp_path / EVENTS_FILE).read_text().splitlines()
    assert len(lines) == 4 and lines[2] == '{"time": "20'
    assert json.loads(lines[3])["event"] == "resumed" and json.loads(lines[3])["from_step"] == 40


@pytest.mark.parametrize("what", ["full", "gone"])
def test_a_disk_that_is_full_or_gone_stops_nothing(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "run"
    if what == "full":
        folder.mkdir()
        (folder / EVENTS_FILE).symlink_to("/dev/full")
    said: list[str] = []
    log = opened(folder, say=said.append)
    log.write("checkpoint written", step=4, bytes=1_200_000)
    log.close(None)
    assert said == ["checkpoint of step 4 written, 1.2 MB", "finished"], "it is said all the same"


# --- what the controller sees -----------------------------------------------------------------------------------------


class Controller:
    """Two workers on two nodes, what is seen of them, and what is posted."""

    def __init__(self, unsent: Path) -> None:
        self.mailbox, self.unsent = Mailbox(), unsent
        self.callback = EventCallback(ProgressCallback(self.mailbox).post, unsent)
        pickle.dumps(self.callback)  # it is sent to the controller
        self._seen = 0

    def start(self, *hosts: str) -> None:
        workers = [SimpleNamespace(metadata=SimpleNamespace(hostname=host)) for host in hosts]
        self.callback.after_worker_group_start(SimpleNamespace(get_workers=lambda: workers))  # type: ignore[arg-type]

    def poll(self, **errors: Exception) -> None:
        status = {rank: WorkerStatus(running=True, error=errors.get(f"rank_{rank}")) for rank in (0, 1)}
        self.callback.after_worker_group_poll_status(WorkerGroupPollStatus(status))

    def report(self, **metrics: float) -> None:
        self.callback.after_report(None, [metrics, {}])

    def posted(self) -> list[dict[str, Any]]:
        """Since the last call, without their times."""
        found = []
        for number, item in self.mailbox.after(self._seen):
            assert item.pop("time")
            self._seen = number
            found.append(item)
        return found


@pytest.fixture
def controller(tmp_path: Path) -> Controller:
    return Controller(tmp_path / "unsent.jsonl")


def test_a_worker_that_is_lost_and_the_one_in_its_place(controller: Controller) -> None:
    controller.start("a", "b")
    controller.poll()
    controller.poll(rank_1=RuntimeError("Traceback:\n  x\nit died"))
    controller.poll(rank_1=RuntimeError("Traceback:\n  x\nit died"))
    controller.start("a", "c")
    controller.start("a", "c")
    assert controller.posted() == [
        {"event": "workers started", "workers": 2, "hosts": ["a", "b"]},
        {"event": "worker lost", "rank": 1, "host": "b", "reason": "it died"},
        {"event": "workers started", "workers": 2, "hosts": ["a", "c"]},
        {"event": "worker replaced", "rank": 1, "host": "c", "reason": "it died"},
        {"event": "workers started", "workers": 2, "hosts": ["a", "c"]},
    ]


def test_a_worker_that_hangs_is_found_and_lost(controller: Controller) -> None:
    controller.start("a", "b")
    controller.posted()
    controller.poll(rank_0=Hang("does not answer on a"))
    place = {"rank": 0, "host": "a", "reason": "does not answer on a"}
    assert controller.posted() == [{"event": "hang found", **place}, {"event": "worker lost", **place}]


def test_fewer_workers_than_before_replace_none(controller: Controller) -> None:
    controller.start("a", "b")
    controller.poll(rank_1=RuntimeError("gone"))
    controller.start("a")
    assert [item["event"] for item in controller.posted()] == ["workers started", "worker lost", "workers started"]


def test_checkpoints_and_what_they_weigh(controller: Controller) -> None:
    controller.report(phase=1.0, step=3, loss=2.0)
    controller.report(phase=1.0, step=4, checkpoint_bytes=1234.0)
    controller.report(phase=3.0, checkpoint_bytes=99.0)  # an evaluation's document, of no step
    assert controller.posted() == [{"event": "checkpoint written", "step": 4, "bytes": 1234}]


@pytest.mark.parametrize(
    ("damaged", "step", "expected"),
    [
        (
            2,
            4,
            [{"event": "damaged checkpoint passed over", "checkpoints": 2}, {"event": "checkpoint loaded", "step": 4}],
        ),
        (1, 0, [{"event": "damaged checkpoint passed over", "checkpoints": 1}]),
        (0, 4, [{"event": "checkpoint loaded", "step": 4}]),
        (0, 0, []),
    ],
)
def test_what_a_start_begins_with(
    controller: Controller, damaged: int, step: int, expected: list[dict[str, Any]]
) -> None:
    controller.report(phase=0.0, damaged_checkpoints=float(damaged), resumed_step=float(step))
    assert controller.posted() == expected


@pytest.mark.parametrize("last_step", [True, False], ids=["after the last step", "resumed after it"])
def test_the_evaluation_begins_once_for_each_start(controller: Controller, last_step: bool) -> None:
    for _ in range(2):
        controller.start("a")
        controller.posted()
        if last_step:
            controller.report(phase=1.0, step=8, done_frac=1.0)
        for done in (0.5, 1.0):
            controller.report(phase=2.0, evaluated_frac=done)
        assert controller.posted() == [{"event": "evaluation begun"}]


def test_metrics_that_wait_are_told_when_they_begin_to_and_when_they_are_sent(controller: Controller) -> None:
    for there in (False, True, True, False, False):
        controller.unsent.touch() if there else controller.unsent.unlink(missing_ok=True)
        controller.report(phase=1.0, step=1)
    file = str(controller.unsent)
    assert controller.posted() == [{"event": "metrics unsent", "file": file}, {"event": "metrics sent", "file": file}]


def test_in_words_there_is_a_line_without_carriage_returns(tmp_path: Path, controller: Controller) -> None:
    said: list[str] = []
    log = opened(tmp_path, say=said.append)
    log.write("cluster ready", workers=0, nodes=1)
    log.write("cluster ready", workers=2, nodes=3)
    controller.start("a", "b")
    controller.poll(rank_1=RuntimeError("it died"))
    controller.start("a", "c")
    controller.report(phase=0.0, damaged_checkpoints=0.0, resumed_step=4.0)
    controller.unsent.touch()
    controller.report(phase=1.0, step=6, done_frac=1.0, checkpoint_bytes=2e6)
    controller.unsent.unlink()
    controller.report(phase=2.0)
    for _, item in controller.mailbox.after(0):
        log.add(item)
    log.close(ValueError("it broke"))
    assert said == [
        "cluster ready (nodes: 3, workers to start: 2)", "workers started: 2, on a, b", "workers started: 2, on a, c",
        "worker 1 replaced, on c", "checkpoint of step 4 loaded", "checkpoint of step 6 written, 2.0 MB",
        f"MLflow does not take metrics: they wait in {controller.unsent}", "MLflow takes metrics again", "failed: it broke",
    ]  # fmt: skip
    assert IN_WORDS["interrupted"](event("interrupted")) == "interrupted"


def test_every_event_and_metric_is_explained() -> None:
    sources = "".join((ROOT / "pipelines" / name).read_text() for name in ("events.py", "train.py", "trial.py"))
    written = set(re.findall(r'(?:_post|\.write)\("([A-Za-z ]+)"', sources)) | {"metrics unsent", "metrics sent"}
    written |= set(re.findall(r'\.write\("\w+" if \w+ else "(\w+)"\)', sources))
    assert len(written) == 18 and set(IN_WORDS) <= written
    page = (ROOT / "docs" / "cluster.md").read_text()
    assert {name for name in written if f"`{name}`" not in page} == set()
    metrics = re.findall(r'"(cortex_mailbox_\w+)"', (ROOT / "pipelines" / "actors.py").read_text())
    assert len(metrics) == 3 and {name for name in metrics if f"`ray_{name}" not in page} == set()
