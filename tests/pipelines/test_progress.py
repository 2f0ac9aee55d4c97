"""What the user sees, and what Ctrl-C leaves. This file is also the program that is interrupted: `STORAGE NOTE`."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.train import Checkpoint, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError
from rich.console import Console

from pipelines import cluster, progress
from pipelines.actors import ask, on_head, send
from pipelines.config import ClusterConfig
from pipelines.mailbox import Mailbox
from pipelines.progress import Progress, ProgressCallback, run_to_end

ROOT = Path(__file__).parents[2]


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def _plain(total: int = 600, **more: Any) -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    return Progress(Console(file=out, width=200), total=total, **more), out


def _training(step: int, **metrics: float) -> dict[str, float]:
    return {"phase": 1.0, "step": step, **metrics}


def test_without_a_terminal_there_are_plain_lines(clock: Clock) -> None:
    shown, out = _plain()
    shown.phase("starting the cluster")
    shown.show({"phase": 0.0})
    for step in range(10, 110, 10):
        clock.now += 4
        shown.show(_training(step, loss=2.5, accuracy=0.25, **{"throughput/tokens_per_s": 12345.0, "grad_norm": 1.0}))
    assert out.getvalue().splitlines() == [
        "starting the cluster",
        "loading the backbone",
        "training",
        "training  step 40/600  loss 2.500  accuracy 25.0%  12.3k tokens/s  3:44 left",
        "training  step 70/600  loss 2.500  accuracy 25.0%  12.3k tokens/s  3:32 left",
        "training  step 100/600  loss 2.500  accuracy 25.0%  12.3k tokens/s  3:20 left",
    ]
    assert "\r" not in out.getvalue() and "\x1b" not in out.getvalue()


@pytest.mark.parametrize(
    ("damaged", "step", "said"),
    [
        (1, 4, "the newest checkpoint is damaged: going on from the one before, of step 4"),
        (2, 4, "the newest 2 checkpoints are damaged: going on from the one before, of step 4"),
        (1, 0, "the newest checkpoint is damaged: going on from the start"),
    ],
)
def test_damaged_checkpoints_are_told(damaged: int, step: int, said: str) -> None:
    shown, out = _plain()
    shown.show({"phase": 0.0, "damaged_checkpoints": float(damaged), "resumed_step": float(step)})
    assert out.getvalue().splitlines() == ["loading the backbone", said]


def test_how_many_workers_there_are_is_told_where_it_is_not_as_wanted() -> None:
    shown, out = _plain()
    for workers in (2, 2, 1, 1, 2):
        shown.show({"phase": 0.0, "workers": workers, "num_workers": 2})
    assert out.getvalue().splitlines() == ["loading the backbone", "1 of 2 workers", "2 of 2 workers"]
    for workers, wanted, said in ((1, 0, []), (1, 1, []), (1, 4, ["1 of 4 workers"])):
        shown, out = _plain()
        shown.show({"phase": 0.0, "workers": workers, "num_workers": wanted})
        assert out.getvalue().splitlines() == ["loading the backbone", *said]


def test_of_a_worker_that_does_not_answer_the_line_that_says_so_is_shown() -> None:
    shown, out = _plain()
    mailbox = Mailbox()
    error = WorkerHealthCheckTimeoutError(
        "A worker health check has been hanging for 600.00 seconds.\nWorker info: long"
    )
    ProgressCallback(mailbox).after_exception(None, {1: error})
    shown.show(mailbox.after(0)[0][1])
    assert (
        out.getvalue().splitlines()[0] == "worker 1 failed: A worker health check has been hanging for 600.00 seconds."
    )


def test_where_there_is_no_terminal_a_line_begins_with_the_name_of_its_run(clock: Clock) -> None:
    shown, out = _plain(total=20, run="[b]mine :x:")
    shown.phase("starting the cluster")
    shown.show(_training(20, loss=1.0))
    shown.show({"failure": "worker 1 failed: broke"})
    lines = out.getvalue().splitlines()
    assert len(lines) == 5 and all(line.startswith("[b]mine :x:: ") for line in lines)
    assert lines[3] == "[b]mine :x:: worker 1 failed: broke"


def test_the_last_step_is_always_shown(clock: Clock) -> None:
    shown, out = _plain(total=20)
    for step in (19, 20):
        shown.show(_training(step, loss=1.0))
    assert out.getvalue().splitlines() == ["training", "training  step 20/20  loss 1.000"]


def test_time_left_counts_the_steps_of_this_run_only(clock: Clock) -> None:
    shown, out = _plain(total=600)
    shown.show(_training(500))  # resumed here
    clock.now += 20
    shown.show(_training(510))
    assert out.getvalue().splitlines()[-1] == "training  step 510/600  3:00 left"


def test_evaluation_is_shown_in_percent(clock: Clock) -> None:
    shown, out = _plain()
    for done in (0.1, 0.4, 1.0):
        shown.show({"phase": 2.0, "evaluated_frac": done})
        clock.now += 11
    assert out.getvalue().splitlines() == ["evaluating", "evaluating  40%", "evaluating  100%"]


def test_a_failure_is_said_and_does_not_spoil_the_estimate(clock: Clock) -> None:
    shown, out = _plain(total=100)
    callback = ProgressCallback(mailbox := Mailbox())
    shown.show(_training(10))
    callback.after_exception(None, {1: RuntimeError("Traceback:\n  x\nValueError: [bold] broke")})
    ((_, failure),) = mailbox.after(0)
    shown.show(failure)
    clock.now += 1000  # restarting takes long
    shown.show(_training(6))
    clock.now += 14
    shown.show(_training(7))
    assert out.getvalue().splitlines() == [
        "training", "worker 1 failed: ValueError: [bold] broke", "starting the workers again", "training",
        "training  step 7/100  21:42 left",
    ]  # fmt: skip


def test_a_long_silence_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "POLL_S", 0.02)
    monkeypatch.setattr(progress, "STILL_EVERY_S", 0.1)
    shown, out = _plain()
    with shown:
        shown.phase("starting the cluster")
        time.sleep(0.3)
    assert "starting the cluster, 0:00 so far" in out.getvalue()


def test_on_a_terminal_there_is_one_bar() -> None:
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True, _environ={"TERM": "xterm"})
    with Progress(console, total=600, run="mine") as shown:
        shown.phase("starting the cluster")
        shown.show(_training(300, loss=1.25))
        shown.show({"failure": "worker 1 failed"})
        shown.show(_training(300, loss=1.25))
        assert shown._bar is not None
        shown._bar.refresh()
    text = out.getvalue()
    assert "mine: " not in text
    assert "starting the cluster" in text and "50%" in text and "step 300/600  loss 1.250" in text
    assert text.count("\n") < 4, "a bar is redrawn in place"


def test_without_ray_reports_go_through_an_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(progress, "POLL_S", 0.01)
    shown, out = _plain(total=2)
    with shown:
        callback = shown.callback()
        callback.after_report(None, [_training(2, loss=0.5), _training(2, loss=9.0)], None)
    assert out.getvalue().splitlines()[-1] == "training  step 2/2  loss 0.500"


@pytest.fixture(params=["object", pytest.param("actor", marks=pytest.mark.slow)])
def mailbox(request: pytest.FixtureRequest) -> Any:
    if request.param == "object":
        return Mailbox(3)
    request.getfixturevalue("ray_here")
    return on_head(Mailbox, 3)


def test_a_mailbox_keeps_the_newest_in_order(mailbox: Any) -> None:
    for n in range(5):
        send(mailbox.post, {"n": n})
    newest = [(3, {"n": 2}), (4, {"n": 3}), (5, {"n": 4})]
    assert ask(mailbox.after, 0, timeout_s=60) == newest
    assert ask(mailbox.after, 0, timeout_s=60) == newest, "an answer that was lost can be had again"
    assert ask(mailbox.after, 4, timeout_s=60) == newest[2:]
    assert ask(mailbox.after, 5, timeout_s=60) == []


# --- running to the end -----------------------------------------------------------------------------------------------


def _endless(settings: dict[str, Any]) -> int:
    """Counts on from its last checkpoint and notes how far it is; with `stop` it returns where it would start."""
    import tempfile

    import ray.train

    start, last = 0, ray.train.get_checkpoint()
    if last is not None:
        with last.as_directory() as folder:
            start = int((Path(folder) / "step").read_text())
    step = start
    while not settings.get("stop"):
        step += 1
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "step").write_text(str(step))
            mine = Checkpoint.from_directory(folder) if ray.train.get_context().get_world_rank() == 0 else None
            ray.train.report({"phase": 1.0, "step": step}, checkpoint=mine)
        Path(settings["note"]).write_text(str(step))
        time.sleep(0.1)
    return step


def _trainer(workers: ClusterConfig, storage: Path, callbacks: list[Any], **settings: Any) -> TorchTrainer:
    run = RunConfig(name="run", storage_path=str(storage), failure_config=cluster.failure(workers), callbacks=callbacks)
    return TorchTrainer(
        _by_value(_endless),
        train_loop_config=settings,
        scaling_config=cluster.scaling(workers),
        run_config=run,
    )


def _by_value(function: Callable[..., Any]) -> Callable[..., Any]:
    """Workers cannot import this file."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[function.__module__])
    return function


@pytest.mark.slow
@pytest.mark.nightly  # test_train does the same with a real run
def test_ctrl_c_stops_the_workers_and_the_run_can_be_resumed(tmp_path: Path, ray_here: ClusterConfig) -> None:
    note = tmp_path / "note"
    driver = subprocess.Popen(
        [sys.executable, __file__, str(tmp_path), str(note)], env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 240
        while not note.exists() or int(note.read_text() or 0) < 3:  # empty while it is being written
            assert driver.poll() is None and time.monotonic() < deadline, driver.communicate()[0]
            time.sleep(0.1)
        children = psutil.Process(driver.pid).children(recursive=True)
        os.killpg(driver.pid, signal.SIGINT)
        said, _ = driver.communicate(timeout=60)
    finally:
        driver.kill()
    assert driver.returncode == 130, said
    lines = [line for line in said.splitlines() if not line.endswith(" so far")]  # on a slow machine
    assert lines[:2] == ["starting the cluster", "training"] and lines[-1] == "interrupted"
    assert psutil.wait_procs(children, timeout=15)[1] == []
    noted = json.loads((tmp_path / "run" / "checkpoint_manager_snapshot.json").read_text())["checkpoint_results"]
    last = max(int((tmp_path / "run" / each["checkpoint_dir_name"] / "step").read_text()) for each in noted)
    one = ray_here.model_copy(update={"num_workers": 1})  # on another number of workers, as it happens
    start = run_to_end(_trainer(one, tmp_path, [], stop=True)).return_value
    assert start == last >= 1


def test_an_interrupt_in_this_process_goes_through(tmp_path: Path) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_to_end(TorchTrainer(interrupted, scaling_config=ScalingConfig(num_workers=0)))


def test_a_run_in_this_process_returns_its_result() -> None:
    handler = signal.getsignal(signal.SIGINT)
    result = run_to_end(TorchTrainer(lambda: 7, scaling_config=ScalingConfig(num_workers=0)))
    assert result.return_value == 7 and signal.getsignal(signal.SIGINT) is handler


def _interruptible(storage: str, note: str) -> None:
    workers = ClusterConfig(num_workers=2, cpus_per_worker=0.5)
    try:
        with Progress(Console(width=100), total=100) as shown:
            shown.phase("starting the cluster")
            with cluster.connect(workers):
                run_to_end(_trainer(workers, Path(storage), [shown.callback()], note=note))
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        sys.exit(130)


if __name__ == "__main__":
    _interruptible(*sys.argv[1:])
