"""Runs a worker function under Ray Train, or in this process, and returns the folder of its last checkpoint."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import ray.train
from ray.train import Checkpoint, CheckpointConfig, LoggingConfig, UserCallback
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.callback import RayTrainCallback

from cortex_core.errors import DataError
from cortex_core.training.checkpoint import step_of
from pipelines import cluster, worker
from pipelines.config import RunConfig
from pipelines.progress import Refusals, run_to_end
from pipelines.runs import LAST, Run

Job = Literal["train", "evaluate"]
KEPT_CHECKPOINTS = 2


def launch(
    job: Job,
    config: RunConfig,
    run: Run,
    callbacks: Sequence[RayTrainCallback],
    sidecars: Path | None = None,
    on_interrupt: Callable[[], None] = lambda: None,
) -> Path:
    """Run a job to its end, from its last checkpoint. Returns a local folder with the files of its last report.

    Raises what the workers raised when `cluster.max_failures` is used up, KeyboardInterrupt on
    Ctrl-C; `on_interrupt` is called before the workers are stopped, which takes seconds.
    """
    newest = run.newest_checkpoint()
    # Ray finds its own, and removes them in time: a worker that is replaced later must not look for one that is gone.
    without_ray = str(newest) if newest is not None and newest.name == LAST else None
    settings = {
        "job": job, "config": config.model_dump_json(), "sidecars": str(sidecars) if sidecars else None,
        "without_ray": without_ray,
    }  # fmt: skip
    if config.cluster.num_workers == 0:
        return _in_this_process(settings, run, callbacks)
    trainer = TorchTrainer(
        on_worker,
        train_loop_config=settings,
        scaling_config=cluster.scaling(config.cluster),
        run_config=ray.train.RunConfig(
            name=_storage_name(job, config, run),
            storage_path=config.cluster.storage_path or str(run.checkpoints),
            failure_config=cluster.failure(config.cluster),
            checkpoint_config=CheckpointConfig(num_to_keep=KEPT_CHECKPOINTS),
            callbacks=[Refusals(), *callbacks],  # type: ignore[list-item]
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    result = run_to_end(trainer, on_interrupt)
    assert result.checkpoint is not None
    local = run.checkpoints / "result"
    shutil.rmtree(local, ignore_errors=True)
    return Path(result.checkpoint.to_directory(local))


def _storage_name(job: Job, config: RunConfig, run: Run) -> str:
    """Where Ray Train looks for this run's checkpoints: the same name resumes, so no other run may have it."""
    name = run.storage_name if job == "train" else f"{run.storage_name}-evaluation"
    shared = config.cluster.storage_path is not None  # by runs of all names, also those whose folders are gone
    return f"{config.name}-{run.mlflow_run_id or 'untracked'}-{name}" if shared else name


def on_worker(settings: dict[str, Any]) -> None:
    """What Ray Train calls on each worker."""
    cluster.quiet_worker()
    context = ray.train.get_context()

    def report(metrics: dict[str, float], folder: Path | None) -> None:
        checkpoint = None if folder is None else Checkpoint.from_directory(folder)
        ray.train.report(metrics, checkpoint=checkpoint)

    without_ray = Path(settings["without_ray"]) if settings["without_ray"] else None
    _do(
        settings,
        worker.Edge(context.get_world_rank(), context.get_world_size(), report, lambda: _last_checkpoint(without_ray)),
    )


@contextmanager
def _last_checkpoint(without_ray: Path | None) -> Iterator[Path | None]:
    """Ray's own last checkpoint, or one further on that a part of the same attempt without Ray has left."""
    checkpoint = ray.train.get_checkpoint()
    with nullcontext() if checkpoint is None else checkpoint.as_directory() as folder:
        known = None if folder is None else Path(folder)
        if without_ray is None:
            yield known
            return
        if not without_ray.is_dir():
            raise DataError(f"checkpoint {without_ray}: is not seen from {socket.gethostname()}; use a shared out_dir")
        further = known is None or (step_of(without_ray) or 0) > (step_of(known) or 0)
        yield without_ray if further else known


def _in_this_process(settings: dict[str, Any], run: Run, callbacks: Sequence[RayTrainCallback]) -> Path:
    """The same worker without Ray: one process, checkpoints straight into the run's folder."""
    root = run.checkpoints / run.storage_name
    last = root / LAST

    def report(metrics: dict[str, float], folder: Path | None) -> None:
        if folder is not None:
            root.mkdir(parents=True, exist_ok=True)
            shutil.copytree(folder, root / "next", dirs_exist_ok=True)
            shutil.rmtree(last, ignore_errors=True)
            (root / "next").rename(last)
        for callback in callbacks:
            if isinstance(callback, UserCallback):
                callback.after_report(None, [metrics], None)  # type: ignore[arg-type]

    _do(settings, worker.Edge(0, 1, report, lambda: nullcontext(run.newest_checkpoint())))
    return last


def _do(settings: dict[str, Any], edge: worker.Edge) -> None:
    config = RunConfig.model_validate_json(settings["config"])
    if settings["job"] == "train":
        worker.train(config, edge)
    else:
        worker.evaluate(config, edge, Path(settings["sidecars"]))
