"""Metrics on their way to one MLflow run: each step once, and kept when the store does not answer."""

from __future__ import annotations

import json
import logging
import os
import socket
import sqlite3
import time
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from cortex_core.errors import DataError

if TYPE_CHECKING:
    from mlflow import MlflowClient

ANSWER_TIMEOUT_S = 5.0
RETRY_S = (5.0, 10.0, 30.0, 60.0)
"""Pauses after the first failure, the second, … The last one repeats."""
MAX_METRICS_PER_CALL = 1000
PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
# Patience of MLflow's own, minutes by default, would be the training's: it waits in the caller's thread. The
# rest keeps MLflow from reporting usage and from printing links that do not fit this program's output.
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


class MetricLog:
    """Never raises because of MLflow. One instance per process writes a given metric.

    Before a metric is first sent, its last step is read back from the store: a step up to there is not sent
    again. What cannot be sent is kept in memory and in the file `unsent`, from where the next instance for
    the same run takes it up: this process may end before the store answers again.
    """

    def __init__(self, uri: str, run_id: str, unsent: Path) -> None:
        self._uri, self._run_id = uri, run_id
        self.unsent = unsent
        """Where values are kept meanwhile; there is no such file while all is well."""
        self._waiting: dict[tuple[str, int], tuple[float, int]] = {}  # (name, step): (value, time in ms)
        self._last: dict[str, int] = {}
        self._client: MlflowClient | None = None
        self._failures = 0
        self._retry_at = 0.0
        self._read_unsent = False

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_client": None}  # it holds connections; each process opens its own

    def write(self, metrics: Mapping[str, Any], step: int) -> None:
        """Send all numbers among `metrics`, now or as soon as the store answers again."""
        now = time.time_ns() // 1_000_000
        numbers = {(name, step): number for name, value in metrics.items() if (number := _number(value)) is not None}
        new = {at: (number, now) for at, number in numbers.items() if at not in self._waiting}
        self._waiting |= new
        if time.monotonic() >= self._retry_at:
            self.flush()
        else:
            self._keep(new, "a")

    def flush(self) -> int:
        """Try to send everything. Returns how many values still wait."""
        self._take_up_unsent()
        if not self._waiting:
            return 0
        try:
            self._send()
        except Exception as error:
            logging.getLogger(__name__).debug("MLflow did not take metrics: %s", error)
            self._client = None  # a broken connection may stay broken
            self._retry_at = time.monotonic() + RETRY_S[min(self._failures, len(RETRY_S) - 1)]
            self._failures += 1
            self._keep(self._waiting, "w")
        else:
            self._failures, self._retry_at = 0, 0.0
            self.unsent.unlink(missing_ok=True)
        return len(self._waiting)

    def _send(self) -> None:
        from mlflow.entities import Metric

        check_answers(self._uri)
        self._client = client = self._client or open_client(self._uri)
        for name in {name for name, _ in self._waiting} - self._last.keys():
            history = client.get_metric_history(self._run_id, name)
            self._last[name] = max((point.step for point in history), default=-1)
        fresh = {at: value for at, value in self._waiting.items() if at[1] > self._last[at[0]]}
        self._waiting = dict(sorted(fresh.items(), key=lambda item: item[0][1]))
        while self._waiting:
            part = list(self._waiting.items())[:MAX_METRICS_PER_CALL]
            batch = [Metric(name, value, at, step) for (name, step), (value, at) in part]
            client.log_batch(self._run_id, metrics=batch, synchronous=True)
            for (name, step), _ in part:
                self._last[name] = max(self._last[name], step)
                del self._waiting[name, step]

    def _keep(self, values: Mapping[tuple[str, int], tuple[float, int]], mode: Literal["a", "w"]) -> None:
        """Add to the file, or write it anew."""
        lines = [
            json.dumps({"run": self._run_id, "metric": name, "step": step, "value": value, "time_ms": at}) + "\n"
            for (name, step), (value, at) in values.items()
        ]
        try:
            self.unsent.parent.mkdir(parents=True, exist_ok=True)
            partial = self.unsent.with_suffix(f".{os.getpid()}.partial") if mode == "w" else self.unsent
            with partial.open(mode) as file:
                file.write("".join(lines))
            partial.replace(self.unsent)
        except OSError as error:  # nor may a full disk stop the training here
            logging.getLogger(__name__).debug("metrics could not be kept: %s", error)

    def _take_up_unsent(self) -> None:
        if self._read_unsent:
            return
        self._read_unsent = True
        before: dict[tuple[str, int], tuple[float, int]] = {}
        with suppress(OSError, UnicodeDecodeError):
            for line in self.unsent.read_text().splitlines():
                with suppress(ValueError, KeyError, TypeError):  # cut short when a process ended, or the disk was full
                    row = json.loads(line)
                    if row["run"] == self._run_id:
                        before[row["metric"], row["step"]] = row["value"], row["time_ms"]
        self._waiting = before | self._waiting


def latest(uri: str, run_id: str, names: Iterable[str]) -> dict[str, float]:
    """What the store has of the last step at which the first of `names` was written; `step` is in there, too.

    Raises DataError: it has nothing of one of them then.
    """
    client, found = open_client(absolute(uri)), dict[str, float]()
    for name in names:
        history = client.get_metric_history(run_id, name)
        step = found.setdefault("step", max((point.step for point in history), default=-1))
        values = [point.value for point in history if point.step == step]
        if not values:
            raise DataError(f"run {run_id} in MLflow at {uri}: has no {name} of its last step; start this run anew")
        found[name] = values[-1]
    return found


def open_client(uri: str) -> MlflowClient:
    """MLflow's client for `uri`, quiet and impatient. Settings in the environment win."""
    for name, value in (PATIENCE | QUIET).items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def check_answers(uri: str) -> None:
    """Raises OSError or sqlite3.Error at once where MLflow would try again for minutes."""
    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///"))
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=ANSWER_TIMEOUT_S)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("PRAGMA user_version")
        return
    parts = urlsplit(uri)
    port = parts.port or PORTS.get(parts.scheme.split("+")[0])
    if parts.hostname and port:
        socket.create_connection((parts.hostname, port), timeout=ANSWER_TIMEOUT_S).close()


def absolute(uri: str) -> str:
    """A relative SQLite path counted from here: Ray's processes have other working folders."""
    path = uri.removeprefix("sqlite:///")
    return f"sqlite:///{Path(path).absolute()}" if path != uri else uri


def first_line(error: Exception) -> str:
    """The part of a library's message that fits on a line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _number(value: Any) -> float | None:
    """Python, numpy and torch scalars; None for what MLflow cannot draw."""
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "size", 1) != 0:
        try:
            value = item()
        except (ValueError, RuntimeError, TypeError):
            return None
    return float(value) if isinstance(value, (bool, int, float)) else None
