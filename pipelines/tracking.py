"""The one place that writes MLflow.

The driver starts and finishes a run (`start`, `TrackedRun`); metrics come from a callback on Ray Train's
controller (`MlflowCallback`). A store that does not answer stops a run at its start, with one line, and never
later: what cannot be sent waits, is tried again, and at the end lies in `unsent_metrics.jsonl` in the run's
folder.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from ray.train import Checkpoint, UserCallback

from cortex_core.errors import ConfigError
from pipelines.config import DATABASE_FILE, RunConfig
from pipelines.metric_log import MetricLog, absolute, check_answers, first_line, open_client
from pipelines.provenance import log_config, log_params, log_source

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

ARTIFACTS = "mlartifacts"
"""Folder beside a local database. A server decides for itself where artifacts go."""
UNSENT_FILE, UNSENT_BY_DRIVER_FILE = "unsent_metrics.jsonl", "unsent_metrics_of_driver.jsonl"
POSITION = ("step", "phase", "done_frac", "evaluated_frac", "checkpoint_bytes")
"""What a report says about where the run is and what it leaves; the rest are metrics."""
CURVES = ("loss", "accuracy", "throughput/tokens_per_s")
SYSTEM_METRICS_INTERVAL_S = 10
BEST_TAG = "sweep.best"
_SQLITE = "sqlite:///"
Status = Literal["FINISHED", "FAILED", "KILLED"]


class MlflowCallback(UserCallback):
    """Writes what rank 0 reports with a `step`. Runs on Ray Train's controller; in local mode call it
    directly.

    A step that a restarted worker or a resumed run goes through again is written once. Reports without a step
    only say how far the run is.
    """

    def __init__(self, log: MetricLog) -> None:
        self._log = log

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """Called with one dict per rank after all of them have reported."""
        reported = {name: value for name, value in metrics[0].items() if name not in POSITION}
        if "step" in metrics[0]:
            self._log.write(reported, step=int(metrics[0]["step"]))


class TrackedRun:
    """A run in MLflow, written by the driver. As a context manager it finishes with the status that fits."""

    def __init__(self, client: MlflowClient, run: Run, uri: str, config: RunConfig) -> None:
        self.run_id: str = run.info.run_id
        """MLflow's id; give it to `start` to continue this run."""
        self.uri = uri
        self.unsent = config.run_dir / UNSENT_FILE
        """Where metrics wait that could not be sent; there is no such file while all is well."""
        self._client, self._config, self._experiment_id = client, config, run.info.experiment_id
        self._log = MetricLog(uri, self.run_id, config.run_dir / UNSENT_BY_DRIVER_FILE)
        self._monitor: Any = None
        self.problems: list[str] = []
        """A line for each thing that MLflow has not taken so far."""
        self._finished = False

    def __enter__(self) -> TrackedRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        interrupted = kind is not None and not issubclass(kind, Exception)
        self.finish("FINISHED" if kind is None else "KILLED" if interrupted else "FAILED")

    def callback(self) -> MlflowCallback:
        """For `RunConfig(callbacks=[...])` of Ray Train."""
        return MlflowCallback(MetricLog(self.uri, self.run_id, self.unsent))

    def log_metrics(self, metrics: Mapping[str, Any], step: int) -> None:
        """Numbers of the driver's own, such as the evaluation. Not those that go through the callback."""
        self._log.write(metrics, step)

    def log_artifacts(self, paths: Iterable[Path], folder: str | None = None) -> None:
        """Files and folders, copied into the run's artifacts."""
        for path in paths:
            send = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
            inside = "/".join(filter(None, [folder, path.name])) if path.is_dir() else folder
            self._record(str(path), lambda send=send, path=path, at=inside: send(self.run_id, str(path), at))

    def log_figure(self, figure: Any, name: str) -> None:
        """A matplotlib figure, under a file name such as `reach.png`."""
        self._record(name, lambda: self._client.log_figure(self.run_id, figure, name))

    def log_table(self, rows: list[dict[str, Any]], name: str) -> None:
        """Rows with the same keys, under a name ending in `.json`; MLflow compares tables across runs."""
        columns = {key: [row[key] for row in rows] for key in rows[0]} if rows else {}
        self._record(name, lambda: self._client.log_table(self.run_id, columns, name))

    def log_params(self, values: Mapping[str, str]) -> None:
        """Parameters beside those of the configuration; one that is there already stays."""
        self._record("parameters", lambda: log_params(self._client, self._client.get_run(self.run_id), values))

    def log_tags(self, values: Mapping[str, str]) -> None:
        """Tags, which unlike parameters can be written anew."""
        self._record("tags", lambda: [self._client.set_tag(self.run_id, *each) for each in values.items()])

    def tag_best(self, child_id: str) -> None:
        """Of this run's children, `child_id` alone is tagged `sweep.best`."""

        def send() -> None:
            for child in self._children():
                if child.info.run_id == child_id:
                    self._client.set_tag(child_id, BEST_TAG, "true")
                elif BEST_TAG in child.data.tags:
                    self._client.delete_tag(child.info.run_id, BEST_TAG)

        self._record("the best run's tag", send)

    def close_children(self) -> None:
        """Children that are still RUNNING become KILLED: whoever would have closed them is gone."""

        def send() -> None:
            for child in self._children("attributes.status = 'RUNNING'"):
                self._client.set_terminated(child.info.run_id, "KILLED")

        self._record("status of the children", send)

    def _children(self, also: str = "") -> list[Run]:
        mine = f"tags.`mlflow.parentRunId` = '{self.run_id}'" + (f" and {also}" if also else "")
        found, token = list[Any](), None
        while True:
            page = self._client.search_runs([self._experiment_id], mine, max_results=1000, page_token=token)
            found, token = [*found, *page], page.token
            if not token:
                return found

    def history(self) -> list[dict[str, float]]:
        """The course of training, to be drawn: rows of `step` and those of CURVES that were reported then."""
        rows: dict[int, dict[str, float]] = {}

        def read() -> None:
            for name in CURVES:
                for point in self._client.get_metric_history(self.run_id, name):
                    row = rows.setdefault(point.step, {"step": point.step})
                    row[name.rpartition("/")[2]] = point.value

        self._record("training curves", read)
        return [row for _, row in sorted(rows.items())]

    def interrupted(self) -> None:
        """Say KILLED at once: a job that a cluster stops has three seconds, which the rest of the end may need."""
        self._record("status KILLED", lambda: self._client.set_terminated(self.run_id, "KILLED"))

    def finish(self, status: Status = "FINISHED") -> list[str]:
        """Close the run. Returns one line for each thing that MLflow did not take; the first call counts."""
        if self._finished:
            return self.problems
        self._finished = True
        if self._monitor is not None:
            self._monitor.finish()
        # What the controller could not send is in the file by now; this is the last attempt.
        for log in (MetricLog(self.uri, self.run_id, self.unsent), self._log):
            if waiting := log.flush():
                self.problems.append(
                    f"{waiting} metric values did not reach MLflow at {self.uri}: kept in {log.unsent}"
                )
        self._record(f"status {status}", lambda: self._client.set_terminated(self.run_id, status))
        return self.problems

    def ui_command(self) -> str:
        """What to type to see this run; empty if a server shows it already."""
        folder = Path(self._config.out_dir).absolute()
        below = folder.is_relative_to(Path.cwd())
        return "" if self._served else f"cortex ui {os.path.relpath(folder) if below else folder}"

    @property
    def url(self) -> str:
        """Page of this run: at the tracking server, or where `ui_command()` serves it."""
        host = self.uri.rstrip("/") if self._served else "http://127.0.0.1:5000"
        return f"{host}/#/experiments/{self._experiment_id}/runs/{self.run_id}"

    @property
    def _served(self) -> bool:
        return self.uri.startswith(("http://", "https://"))

    def _record(self, what: str, send: Callable[[], object]) -> None:
        try:
            check_answers(self.uri)
            send()
        except Exception as error:  # a sink may not fail a run that has started
            self.problems.append(f"{what}: MLflow at {self.uri} failed ({first_line(error)})")

    def _watch_system(self, resumed: bool) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)
        self._monitor = SystemMetricsMonitor(
            self.run_id, SYSTEM_METRICS_INTERVAL_S, resume_logging=resumed, tracking_uri=self.uri
        )
        self._monitor.start()


def start(config: RunConfig, *, run_id: str | None = None, parent_run_id: str | None = None) -> TrackedRun:
    """Open a run in MLflow, or go on with `run_id`; call it in the driver, before anything expensive.

    A new run is a child of `parent_run_id`, if one is given: MLflow's page shows it below its parent.

    Creates the database and the experiment where needed, once, so that no worker has to. Parameters are the
    resolved configuration under dotted names. The git revision goes into tags, what differs from it into an
    artifact. A `run_id` that the store does not know gives a new run.

    Raises ConfigError: the store cannot be reached or used.
    """
    uri = absolute(config.tracking_uri)
    try:
        check_answers(uri)
        with _alone(uri):
            client = open_client(uri)
            run, resumed = _open_run(client, config, run_id, parent_run_id)
        log_config(client, run, config)
        log_source(client, run.info.run_id)
        tracked = TrackedRun(client, run, uri, config)
        if config.tracking.system_metrics:
            tracked._watch_system(resumed)
    except ConfigError:
        raise
    except Exception as error:  # whatever mlflow, sqlalchemy or requests raise
        raise ConfigError(
            f"tracking.uri = {uri}: MLflow cannot be used there ({first_line(error)}). "
            "Start the server or correct the address, or leave tracking.uri unset to use "
            f"{DATABASE_FILE} in out_dir"
        ) from error
    return tracked


def of_many(config: RunConfig, what: str) -> RunConfig:
    """For `start`: the run above many runs. Its name is no run's, what cannot be sent lies beside the results."""
    watched = config.tracking.model_copy(update={"system_metrics": False, "uri": config.tracking_uri})
    name = f"{config.name}-{what}"
    return config.model_copy(update={"name": name, "out_dir": str(config.run_dir), "tracking": watched})


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """One process at a time: of two that create the same local database, each would find what the other began."""
    if not uri.startswith(_SQLITE):
        yield
        return
    folder = os.open(Path(uri.removeprefix(_SQLITE)).parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _open_run(
    client: MlflowClient, config: RunConfig, run_id: str | None, parent_run_id: str | None
) -> tuple[Run, bool]:
    from mlflow.exceptions import MlflowException

    if run_id is not None:
        try:
            run = client.get_run(run_id)
            if run.info.lifecycle_stage == "active":
                client.update_run(run_id, status="RUNNING")
                return run, True
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    tags = {} if parent_run_id is None else {"mlflow.parentRunId": parent_run_id}
    return client.create_run(_experiment(client, config), run_name=config.name, tags=tags), False


def _experiment(client: MlflowClient, config: RunConfig) -> str:
    name = config.tracking.experiment
    found = client.get_experiment_by_name(name)
    if found is None:
        database = absolute(config.tracking_uri).removeprefix(_SQLITE)
        local = (Path(database).parent / ARTIFACTS).as_uri() if database.startswith("/") else None
        return client.create_experiment(name, artifact_location=local)
    if found.lifecycle_stage != "active":
        raise ConfigError(
            f"tracking.experiment = {name}: was deleted in MLflow. Restore it "
            f"(mlflow experiments restore --experiment-id {found.experiment_id}), or choose another name"
        )
    return found.experiment_id
