"""What a run of `cortex train` has left, by name, and ways to interfere with it at the right moment."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun
from safetensors.torch import load_file
from torch import Tensor

from cortex_core.backbone.sidecar_files import WEIGHTS
from pipelines import train
from pipelines.config import SIDECARS_FOLDER, RunConfig
from pipelines.events import EVENTS_FILE
from pipelines.runs import STATE_FILE
from tests import tiny
from tests.processes import at_work

ROOT = Path(__file__).parents[2]
STEPS = 6
LONG = 12
TWO = {
    "cluster__num_workers": 2, "cluster__cpus_per_worker": 0.5, "sharding__stage": 3, "training__steps": LONG,
    "seed": 2,  # under 0, a gate stands exactly on the dead zone: rounding decides whether it has a gradient
}  # fmt: skip


def sidecars(config: RunConfig) -> dict[str, Tensor]:
    return load_file(config.run_dir / SIDECARS_FOLDER / WEIGHTS)


def state(config: RunConfig) -> dict[str, object]:
    return json.loads((config.run_dir / STATE_FILE).read_text())


def in_mlflow(config: RunConfig) -> list[MlflowRun]:
    """All runs of this configuration's name, the oldest first."""
    client = MlflowClient(tracking_uri=config.tracking_uri)
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    return [run for run in found if run.info.run_name == config.name]


def steps_of(config: RunConfig, run: MlflowRun, metric: str = "loss") -> list[int]:
    client = MlflowClient(tracking_uri=config.tracking_uri)
    return [point.step for point in client.get_metric_history(run.info.run_id, metric)]


def events(config: RunConfig) -> list[dict[str, Any]]:
    """What happened to the run, all its parts."""
    return [json.loads(line) for line in (config.run_dir / EVENTS_FILE).read_text().splitlines()]


def happened(config: RunConfig) -> list[str]:
    return [row["event"] for row in events(config)]


def logged_once(config: RunConfig, steps: int = STEPS) -> None:
    """One MLflow run, finished, with every step once in every metric of training."""
    (run,) = in_mlflow(config)
    assert run.info.status == "FINISHED" and run.info.run_id == state(config)["mlflow_run_id"]
    for metric in ("loss", "accuracy", "throughput/tokens_per_s", "gradient_norm"):
        assert steps_of(config, run, metric) == list(range(1, steps + 1)), metric


def learned_alone(out: Path, settings: dict[str, Any]) -> dict[str, Tensor]:
    """The same settings in one process, without Ray and without shards."""
    config = tiny.run_config(out, **settings | {"cluster__num_workers": 0, "sharding__stage": 0})
    assert train.run(config) == 0
    return sidecars(config)


def has_checkpoint(config: RunConfig) -> bool:
    """Whether one is on record, from which the run as it now is would go on."""
    storage = Path(config.cluster.storage_path or config.run_dir / "checkpoints")
    mine = state(config)["mlflow_run_id"] if (config.run_dir / STATE_FILE).is_file() else None
    snapshots = storage.glob("*attempt-000/checkpoint_manager_snapshot.json")
    return any(config.cluster.storage_path is None or f"-{mine}-" in path.parent.name for path in snapshots)


def checkpoints(config: RunConfig) -> Iterator[Path]:
    """Folders of the checkpoints that Ray has for the run."""
    storage = Path(config.cluster.storage_path or config.run_dir / "checkpoints")
    mine = state(config)["mlflow_run_id"]
    return storage.glob(f"*-{mine}-attempt-*/checkpoint_2*")


def recorded(config: RunConfig) -> set[Path]:
    """Those that Ray knows of: one that was being reported when the run was interrupted lies beside them for good."""
    found = set(checkpoints(config))
    said = "".join((folder.parent / "checkpoint_manager_snapshot.json").read_text() for folder in found)
    return {folder for folder in found if folder.name in said}


@contextmanager
def once(ready: Callable[[], bool], then: Callable[[], None], within_s: float = 600.0) -> Iterator[None]:
    """Meanwhile, in another thread: `then`, as soon as `ready`."""
    over = threading.Event()

    def watch() -> None:
        deadline = time.monotonic() + within_s
        while not over.wait(0.05) and time.monotonic() < deadline:
            if ready():
                then()
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def train_workers(driver: int | None = None) -> list[psutil.Process]:
    """Processes of Ray Train's workers below a driver, by default this process."""
    return at_work("RayTrainWorker", driver)
