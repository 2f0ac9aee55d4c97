"""Against real stores: SQLite in a temporary folder, and ports where nobody listens."""

from __future__ import annotations

import io
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import ray.train
from mlflow import MlflowClient
from ray.train import Checkpoint
from ray.train.torch import TorchTrainer
from rich.console import Console

from cortex_core.errors import ConfigError
from pipelines import cluster, provenance, tracking
from pipelines.config import ClusterConfig, RunConfig, load_config
from pipelines.progress import Progress, run_to_end


def _config(folder: Path, **overrides: object) -> RunConfig:
    settings = {"out_dir": str(folder), "name": "first", "tracking.system_metrics": False}
    return load_config(overrides=settings | overrides)


@pytest.fixture
def config(tmp_path: Path, mlflow_database: Callable[[Path], None]) -> RunConfig:
    mlflow_database(tmp_path)
    return _config(tmp_path)


def _steps(run: tracking.TrackedRun, metric: str) -> list[tuple[int, float]]:
    history = MlflowClient(tracking_uri=run.uri).get_metric_history(run.run_id, metric)
    return [(point.step, point.value) for point in history]


def _report(callback: tracking.MlflowCallback, step: int, **metrics: Any) -> None:
    rank_0 = {"step": step, "phase": 1.0, **metrics}
    callback.after_report(None, [rank_0, {"step": step, "loss": -1.0}], None)


def test_a_run_holds_the_configuration_and_what_was_reported(config: RunConfig, tmp_path: Path) -> None:
    with tracking.start(config) as run:
        callback = pickle.loads(pickle.dumps(run.callback()))
        for step in (10, 20):
            _report(callback, step, **{"loss": 1 / step, "throughput/tokens_per_s": 5, "note": "text"})
        callback.after_report(None, [{"phase": 2.0, "evaluated_frac": 0.5}], None)
        run.log_metrics({"reach_tokens": 4096}, step=20)
    saved = MlflowClient(tracking_uri=run.uri).get_run(run.run_id)
    assert run.uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert saved.info.status == "FINISHED" and saved.info.run_name == "first"
    assert saved.data.params["fast_weights.rank"] == str(config.fast_weights.rank)
    assert saved.data.params["cluster.address"] == "null" and saved.data.params["backbone.name"] == config.backbone.name
    assert saved.data.metrics == {"loss": 0.05, "throughput/tokens_per_s": 5.0, "reach_tokens": 4096.0}
    assert _steps(run, "loss") == [(10, 0.1), (20, 0.05)]
    assert run.finish() == [] and not run.unsent.exists()
    assert run.history() == [
        {"step": 10, "loss": 0.1, "tokens_per_s": 5.0}, {"step": 20, "loss": 0.05, "tokens_per_s": 5.0},
    ]  # fmt: skip


_OPEN_ONE = """
import sys
from pipelines import tracking
from pipelines.config import load_config
config = load_config(overrides={"out_dir": sys.argv[1], "name": sys.argv[2], "tracking.system_metrics": False})
print("ready", flush=True)
sys.stdin.readline()
with tracking.start(config):
    pass
"""


def test_runs_that_open_a_new_store_at_once_wait_for_one_another(tmp_path: Path) -> None:
    names = ["one", "two", "three"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _OPEN_ONE, str(tmp_path), name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for name in names
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    found = client.search_runs(client.get_experiment_by_name("cortex").experiment_id)
    assert sorted(run.info.run_name for run in found) == sorted(names)


def test_a_package_inside_another_repository_has_no_revision(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "_git", lambda command, *rest: None if command == "ls-files" else "theirs")
    with tracking.start(config) as run:
        pass
    assert "mlflow.source.git.commit" not in MlflowClient(tracking_uri=run.uri).get_run(run.run_id).data.tags


def test_artifacts_lie_beside_the_database(config: RunConfig, tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    (tmp_path / "report.html").write_text("<p>")
    (tmp_path / "sidecars").mkdir()
    (tmp_path / "sidecars" / "config.json").write_text("{}")
    with tracking.start(config) as run:
        run.log_artifacts([tmp_path / "report.html", tmp_path / "sidecars"])
        run.log_artifacts([tmp_path / "report.html"], folder="again")
        run.log_figure(Figure(), "figures/reach.png")
        run.log_table([{"gap_tokens": 0, "accuracy": 1.0}, {"gap_tokens": 256, "accuracy": 0.5}], "reach.json")
    artifacts = next((tmp_path / "mlartifacts").glob(f"{run.run_id}/artifacts"))
    found = {str(p.relative_to(artifacts)) for p in artifacts.rglob("*") if p.is_file()} - {provenance.DIFF_FILE}
    expected = {"report.html", "sidecars/config.json", "again/report.html", "figures/reach.png", "reach.json"}
    assert found == expected and run.finish() == []


def test_the_source_is_recorded(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"ls-files": "x", "rev-parse": "abc123\n", "status": " M train.py\n", "diff": "+ a line\n"}
    monkeypatch.setattr(provenance, "_git", lambda command, *rest: answers[command])
    with tracking.start(config) as run:
        pass
    tags = MlflowClient(tracking_uri=run.uri).get_run(run.run_id).data.tags
    assert tags["mlflow.source.git.commit"] == "abc123" and tags["source.dirty"] == "true"
    assert "+ a line" in next(tmp_path.rglob(provenance.DIFF_FILE)).read_text()


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (ValueError("x"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_the_status_tells_how_it_ended(config: RunConfig, error: BaseException | None, status: str) -> None:
    def leave() -> None:
        nonlocal run
        with tracking.start(config) as run:
            if error is not None:
                raise error

    run: Any = None
    if error is None:
        leave()
    else:
        with pytest.raises(type(error)):
            leave()
    assert MlflowClient(tracking_uri=run.uri).get_run(run.run_id).info.status == status


def test_no_step_is_written_twice(config: RunConfig) -> None:
    run = tracking.start(config)
    callback = run.callback()
    for step in (1, 2, 3):
        _report(callback, step, loss=step)
    for step in (2, 3, 4):  # the worker came back from the checkpoint of step 1
        _report(callback, step, loss=step + 0.5)
    run.finish("KILLED")
    resumed = tracking.start(config, run_id=run.run_id)
    assert resumed.run_id == run.run_id
    assert MlflowClient(tracking_uri=run.uri).get_run(run.run_id).info.status == "RUNNING"
    callback = resumed.callback()  # knows nothing but what the store tells
    for step in (3, 4, 5):
        _report(callback, step, loss=step + 0.75, accuracy=0.5)
    resumed.finish()
    assert _steps(resumed, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.5), (5, 5.75)]
    assert _steps(resumed, "accuracy") == [(3, 0.5), (4, 0.5), (5, 0.5)]


def test_resuming_with_other_values_leaves_the_first_ones_and_a_tag(config: RunConfig, tmp_path: Path) -> None:
    with tracking.start(config) as run:
        pass
    with tracking.start(_config(tmp_path, **{"training.steps": 7}), run_id=run.run_id):
        pass
    data = MlflowClient(tracking_uri=run.uri).get_run(run.run_id).data
    assert data.params["training.steps"] == "600" and data.tags["resumed_with.training.steps"] == "7"


def test_a_run_that_the_store_has_lost_starts_anew(config: RunConfig) -> None:
    with tracking.start(config, run_id="0" * 32) as run:
        pass
    assert run.run_id != "0" * 32


@pytest.mark.usefixtures("impatient")
def test_what_never_arrives_is_said_at_the_end_and_sent_by_the_next_run(
    config: RunConfig, locked: Callable[[str], AbstractContextManager[None]]
) -> None:
    run = tracking.start(config)
    with locked(run.uri):
        _report(run.callback(), 5, loss=5.0)
        run.log_metrics({"reach_tokens": 8}, step=5)
        problems = run.finish()
    assert len(problems) == 3, problems
    assert problems[0].startswith("1 metric values did not reach MLflow") and str(run.unsent) in problems[0]
    assert "unsent_metrics_of_driver.jsonl" in problems[1] and problems[2].startswith("status FINISHED: MLflow at ")
    again = tracking.start(config, run_id=run.run_id)
    _report(again.callback(), 6, loss=6.0)
    again.finish()
    assert _steps(again, "loss") == [(5, 5.0), (6, 6.0)]


def _closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("scheme", ["http", "postgresql"])
def test_an_unreachable_store_is_one_line_at_once(tmp_path: Path, scheme: str) -> None:
    uri = f"{scheme}://127.0.0.1:{_closed_port()}/db"
    started = time.monotonic()
    with pytest.raises(ConfigError) as error:
        tracking.start(_config(tmp_path, **{"tracking.uri": uri}))
    assert time.monotonic() - started < 10
    assert str(error.value).startswith(f"tracking.uri = {uri}: MLflow cannot be used there")
    assert "\n" not in str(error.value) and "Start the server" in str(error.value)


@pytest.mark.parametrize("uri", ["sqlite:////proc/no/such.db", "file:///tmp/runs", "gopher://somewhere"])
def test_an_unusable_store_is_one_line_at_once(tmp_path: Path, uri: str) -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"tracking\.uri = ") as error:
        tracking.start(_config(tmp_path, **{"tracking.uri": uri}))
    assert time.monotonic() - started < 10 and "\n" not in str(error.value)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("not a database " * 100)
    with pytest.raises(ConfigError, match=r"mlflow\.db"):
        tracking.start(_config(tmp_path))
    assert (tmp_path / "mlflow.db").read_text() == "not a database " * 100


def test_a_deleted_experiment_is_refused_with_the_way_back(config: RunConfig) -> None:
    with tracking.start(config) as run:
        pass
    client = MlflowClient(tracking_uri=run.uri)
    client.delete_experiment(client.get_run(run.run_id).info.experiment_id)
    with pytest.raises(ConfigError, match=r"tracking\.experiment = cortex: was deleted.*restore --experiment-id"):
        tracking.start(config)


def test_a_relative_database_is_the_same_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with tracking.start(_config(tmp_path, **{"tracking.uri": "sqlite:///mine.db"})) as run:
        assert run.uri == f"sqlite:///{tmp_path}/mine.db"
    assert (tmp_path / "mine.db").exists()


def test_the_way_to_the_page(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path.parent)
    with tracking.start(config) as run:
        assert run.ui_command() == f"cortex ui {tmp_path.name}"
        monkeypatch.chdir("/")
        assert run.ui_command() == f"cortex ui {str(tmp_path).removeprefix('/')}"
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert run.ui_command() == f"cortex ui {tmp_path}"
        assert run.url == f"http://127.0.0.1:5000/#/experiments/1/runs/{run.run_id}"


@pytest.mark.slow
@pytest.mark.nightly
def test_each_step_is_written_once_though_a_worker_dies(
    config: RunConfig, tmp_path: Path, ray_here: ClusterConfig
) -> None:
    def dies_once(settings: dict[str, str]) -> None:
        import os
        import tempfile

        import ray.train

        start, last, died = 0, ray.train.get_checkpoint(), Path(settings["died"])
        if last is not None:
            with last.as_directory() as folder:
                start = int((Path(folder) / "step").read_text())
        for step in range(start + 1, 8):
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "step").write_text(str(step))
                saved = Checkpoint.from_directory(folder) if step == 2 else None
                ray.train.report({"phase": 1.0, "step": step, "loss": float(step)}, checkpoint=saved)
            if step == 5 and not died.exists():
                time.sleep(2)  # until the controller has taken up what was reported
                died.touch()
                os._exit(1)

    workers = ray_here.model_copy(update={"num_workers": 1})
    out = io.StringIO()
    with Progress(Console(file=out, width=100), total=7) as progress, tracking.start(config) as run:
        callbacks = [run.callback(), progress.callback()]
        trainer = TorchTrainer(
            dies_once, train_loop_config={"died": str(tmp_path / "died")}, scaling_config=cluster.scaling(workers),
            run_config=ray.train.RunConfig(
                name="run", storage_path=str(tmp_path), failure_config=cluster.failure(workers), callbacks=callbacks
            ),
        )  # fmt: skip
        run_to_end(trainer)
    assert _steps(run, "loss") == [(step, float(step)) for step in range(1, 8)]
    said = out.getvalue().splitlines()
    assert said[1].startswith("worker 0 failed: ") and "starting the workers again" in said, said
    assert said[-1].startswith("training  step 7/7"), said


@pytest.mark.usefixtures("config")
def test_system_metrics_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "SYSTEM_METRICS_INTERVAL_S", 0.2)
    with tracking.start(_config(tmp_path, **{"tracking.system_metrics": True})) as run:
        deadline = time.monotonic() + 20
        names: set[str] = set()
        while not any(name.startswith("system/cpu") for name in names) and time.monotonic() < deadline:
            time.sleep(0.2)
            names = set(MlflowClient(tracking_uri=run.uri).get_run(run.run_id).data.metrics)
    assert any(name.startswith("system/cpu") for name in names), names
