"""What the tests of the edge share."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path

import pytest

from pipelines.config import ClusterConfig

# Every warning is an error here. These are what our dependencies warn of among themselves.
THEIRS = (
    "ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning",  # mlflow, of sqlalchemy
    "ignore::DeprecationWarning:ray.data.context",  # Ray Data, of its own defaults
)


def pytest_configure(config: pytest.Config) -> None:
    for line in THEIRS:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session")
def mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], None]:
    """Puts an empty MLflow database into a folder: made once, because making one takes seconds."""
    from pipelines.metric_log import open_client

    template = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    open_client(f"sqlite:///{template}").search_experiments()

    def place(folder: Path) -> None:
        shutil.copy(template, folder / "mlflow.db")

    return place


@pytest.fixture
def locked() -> Callable[[str], AbstractContextManager[None]]:
    """Within the block another process holds the SQLite database: every access fails."""

    @contextmanager
    def lock(uri: str) -> Iterator[None]:
        with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as other:
            other.execute("BEGIN EXCLUSIVE")
            yield
            other.rollback()

    return lock


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that does not answer is given up, and tried again, at once."""
    from pipelines import metric_log

    monkeypatch.setattr(metric_log, "ANSWER_TIMEOUT_S", 0.05)
    monkeypatch.setattr(metric_log, "RETRY_S", (0.0,))


@pytest.fixture(scope="session")
def ray_here() -> Iterator[ClusterConfig]:
    """Ray on this machine, started once for all tests that ask for it; starting takes ten seconds."""
    from pipelines.cluster import connect

    config = ClusterConfig(num_workers=2, cpus_per_worker=0.5)
    with connect(config):
        yield config


@pytest.fixture
def trained(tmp_path: Path, mlflow_database: Callable[[Path], None]) -> Path:
    """The folder of a run that has trained the memory that ships."""
    from tests.pipelines.sleep_scenes import trained_run

    mlflow_database(tmp_path)
    return trained_run(tmp_path)
