"""Runs a worker function under Ray Train, or in this process, and returns the folder of its last checkpoint."""

from __future__ import annotations

import math
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ray.train
from ray.train import Checkpoint, CheckpointConfig, CheckpointConsistencyMode, LoggingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import RayTrainCallback, ReportCallback

from cortex_core.errors import DataError
from cortex_core.training.checkpoint import first_whole, newest, step_of
from pipelines import cluster, elastic
from pipelines.config import RunConfig
from pipelines.disk import room_for, size_of
from pipelines.progress import Refusals, run_to_end
from pipelines.runs import BEFORE_LAST, LAST, Run
from pipelines.watch import Watch

if TYPE_CHECKING:  # takes seconds to import, and only workers need it, not the driver nor Ray Train's controller
    from pipelines.worker import Edge

Job = Literal["train", "evaluate", "sleep", "codes"]
Report = Callable[[dict[str, float], Path | None], None]
KEPT_CHECKPOINTS = 2


class _Trainer(TorchTrainer):
    """Without processes that this use of Ray Train starts for nothing, at a second and a half of every start: there are
    no Ray datasets, and a Ray that was started here ends with its driver, with nothing to clean up."""

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        idle = (DatasetsCallback, PlacementGroupCleanerCallback) if cluster.started_here() else (DatasetsCallback,)
        return [each for each in super()._create_default_callbacks() if not isinstance(each, idle)]


def launch(
    job: Job,
    config: RunConfig,
    run: Run,
    callbacks: Sequence[RayTrainCallback],
    sidecars: Path | None = None,
    on_interrupt: Callable[[], None] = lambda: None,
    until_step: int | None = None,
) -> Path:
    """Run a job to its end, from its last checkpoint. Returns a local folder with the files of its last report.

    Training ends at `until_step` if that is given, with a checkpoint and without the evaluation.

    Raises what the workers raised when `cluster.max_failures` is used up, KeyboardInterrupt on
    Ctrl-C; `on_interrupt` is called before the workers are stopped, which takes seconds.
    """
    last = run.newest_checkpoint()
    # Ray finds its own, and removes them in time: a worker that is replaced later must not look for one that is gone.
    without_ray = str(last) if last is not None and last.name in (LAST, BEFORE_LAST) else None
    storage = config.cluster.storage_path or str(run.checkpoints)
    settings = {
        "job": job, "config": config.model_dump_json(), "sidecars": str(sidecars) if sidecars else None,
        "without_ray": without_ray, "storage": storage, "until_step": until_step,
    }  # fmt: skip
    if config.cluster.num_workers == 0:
        return _in_this_process(settings, run, callbacks)
    heard_by = [Refusals(), *(each for each in callbacks if isinstance(each, UserCallback))]
    others = [each for each in callbacks if not isinstance(each, UserCallback)]  # they hear of a hang from the watch
    trainer = _Trainer(
        on_worker,
        train_loop_config=settings,
        # How long a worker waits for the others: long enough that the one at fault is found first.
        torch_config=TorchConfig(timeout_s=math.ceil(max(TorchConfig.timeout_s, 2 * config.cluster.hang_timeout_s))),
        scaling_config=cluster.scaling(config.cluster),
        run_config=ray.train.RunConfig(
            name=_storage_name(job, config, run),
            storage_path=storage,
            failure_config=cluster.failure(config.cluster),
            checkpoint_config=CheckpointConfig(num_to_keep=KEPT_CHECKPOINTS),
            callbacks=[*heard_by, Watch(config.cluster.hang_timeout_s, heard_by), *others],  # type: ignore[list-item]
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    if config.cluster.min_workers is not None:
        elastic.scale(trainer, config)
    result = run_to_end(trainer, on_interrupt)
    assert result.checkpoint is not None
    local = run.checkpoints / "result"
    shutil.rmtree(local, ignore_errors=True)
    return Path(result.checkpoint.to_directory(local))


def _storage_name(job: Job, config: RunConfig, run: Run) -> str:
    """Where Ray Train looks for this run's checkpoints: the same name resumes, so no other run may have it."""
    name = run.storage_name if job != "evaluate" else f"{run.storage_name}-evaluation"
    shared = config.cluster.storage_path is not None  # by runs of all names, also those whose folders are gone
    return f"{config.name}-{run.mlflow_run_id or 'untracked'}-{name}" if shared else name


def on_worker(settings: dict[str, Any]) -> None:
    """What Ray Train calls on each worker."""
    cluster.quiet_worker()
    context = ray.train.get_context()

    def report(metrics: dict[str, float], folder: Path | None) -> None:
        if folder is None:
            ray.train.report(metrics)
            return
        metrics = metrics | _size(folder)
        with _room_in(settings["storage"], folder):
            ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))

    without_ray = Path(settings["without_ray"]) if settings["without_ray"] else None
    from pipelines.worker import Edge

    _do(
        settings,
        Edge(context.get_world_rank(), context.get_world_size(), report, lambda: _last_checkpoint(without_ray, report)),
    )


@contextmanager
def _last_checkpoint(without_ray: Path | None, report: Report) -> Iterator[Path | None]:
    """The last whole checkpoint that Ray has on record, or one further on that a part of the same attempt without Ray
    has left."""
    if without_ray is not None and not without_ray.is_dir():
        raise DataError(f"checkpoint {without_ray}: is not seen from {socket.gethostname()}; use a shared out_dir")
    on_record = ray.train.get_all_reported_checkpoints(CheckpointConsistencyMode.COMMITTED)
    with ExitStack() as opened:  # one after the other: the first that is opened is whole, as a rule
        rays, damaged = first_whole(
            Path(opened.enter_context(each.checkpoint.as_directory())) for each in reversed(on_record)
        )
        last = newest(each for each in (rays, without_ray) if each is not None)
        if on_record:  # on every worker, whatever it finds: all have to report equally often
            _say_damaged(damaged if last == rays else 0, last, report)
        yield last


def _say_damaged(damaged: int, last: Path | None, report: Report) -> None:
    since = 0 if last is None else step_of(last) or 0
    report({"phase": 0.0, "damaged_checkpoints": float(damaged), "resumed_step": float(since)}, None)


def _size(checkpoint: Path) -> dict[str, float]:
    return {"checkpoint_bytes": float(size_of(checkpoint))}


def _room_in(storage: str, checkpoint: Path) -> AbstractContextManager[None]:
    """What a URI names has no disk of this machine behind it."""
    return nullcontext() if "://" in storage else room_for("a checkpoint", Path(storage), size_of(checkpoint))


def _in_this_process(settings: dict[str, Any], run: Run, callbacks: Sequence[RayTrainCallback]) -> Path:
    """The same worker without Ray: one process, checkpoints straight into the run's folder."""
    root = run.checkpoints / run.storage_name
    last = root / LAST

    def report(metrics: dict[str, float], folder: Path | None) -> None:
        if folder is not None:
            metrics = metrics | _size(folder)
            root.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(root / "next", ignore_errors=True)
            with _room_in(str(root), folder):
                shutil.copytree(folder, root / "next")
            if last.is_dir():
                shutil.rmtree(root / BEFORE_LAST, ignore_errors=True)
                last.rename(root / BEFORE_LAST)
            (root / "next").rename(last)
        for callback in callbacks:
            if isinstance(callback, UserCallback):
                callback.after_report(None, [metrics], None)  # type: ignore[arg-type]
            elif isinstance(callback, ReportCallback):
                callback.after_report(None, [metrics])  # type: ignore[arg-type]

    @contextmanager
    def resume_from() -> Iterator[Path | None]:
        newest_here = run.newest_checkpoint()
        if damaged := run.damaged_checkpoints():
            _say_damaged(damaged, newest_here, report)
        yield newest_here

    from pipelines.worker import Edge

    _do(settings, Edge(0, 1, report, resume_from))
    return last


def _do(settings: dict[str, Any], edge: Edge) -> None:
    from pipelines import worker

    config = RunConfig.model_validate_json(settings["config"])
    if settings["job"] == "train":
        worker.train(config, edge, settings["until_step"])
    elif settings["job"] == "sleep":
        from pipelines import sleep_worker

        sleep_worker.sleep(config, edge)
    elif settings["job"] == "codes":
        from pipelines import codes_worker

        codes_worker.code(config, edge)
    else:
        worker.evaluate(config, edge, Path(settings["sidecars"]))
