"""Where a run is, settings of the edge: workers, the frozen backbone on them, and MLflow."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cortex_core.config import PositiveInt, Settings


class ClusterConfig(Settings):
    """Where the workers run."""

    address: str | None = None
    """None starts Ray on this machine for the length of the run; `auto` joins the cluster that is running."""
    autoscaling: bool = False
    """The cluster that is joined adds nodes on demand: workers may ask for more than it has now."""
    num_workers: Annotated[int, Field(ge=0)] = 2
    """Data-parallel workers, one process each; 0 runs in this process, without Ray."""
    min_workers: Annotated[int, Field(ge=1)] | None = None
    """Fewest workers that the run may go on with when nodes are lost or not yet there; null: `num_workers`, always. Of
    the numbers in between it takes those that share every batch evenly. It grows again when there is room."""
    cpus_per_worker: Annotated[float, Field(gt=0.0)] = 1.0
    """CPUs that Ray reserves for each worker. A reservation, not a limit: threads are `worker_threads`."""
    use_gpu: bool = False
    """Give each worker one GPU."""
    worker_threads: PositiveInt = 1
    """torch threads per worker. More than `cpus_per_worker` makes the workers fight over the cores."""
    max_failures: Annotated[int, Field(ge=-1)] = 2
    """Worker failures that are answered by resuming from the last checkpoint; -1 is no limit."""
    worker_start_timeout_s: Annotated[float, Field(gt=0.0)] = 120.0
    """Seconds that the workers may take to be placed and to start; with `autoscaling` also the nodes that they need."""
    hang_timeout_s: Annotated[float, Field(gt=0.0, le=604_800.0)] = 1800.0
    """Seconds from one report of training to the next, with checkpoint and validation, until the worker at fault counts
    as failed. Loading, first steps and the evaluation are not watched, nor is a run without workers."""
    storage_path: str | None = None
    """Folder or URI that every node sees, for Ray's checkpoints; None is `out_dir`, enough on one machine."""

    @property
    def needed_workers(self) -> tuple[str, int]:
        """How many workers there must be room for, after the setting that says so."""
        if self.min_workers is None:
            return "cluster.num_workers", self.num_workers
        return "cluster.min_workers", self.min_workers

    @model_validator(mode="after")
    def fewest_are_no_more_than_all(self) -> ClusterConfig:
        """A range has its lower end below."""
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(
                f"min_workers = {self.min_workers}: must be at most {self.num_workers}, num_workers. "
                "Lower it, raise num_workers, or leave it out: min_workers=null"
            )
        return self


class ShardingConfig(Settings):
    """How the frozen backbone is laid out over the workers. The sidecars are always replicated."""

    stage: Literal[0, 3] = 3
    """3 splits the backbone over the workers (ZeRO-3): less memory, one gather per layer. 0 copies it."""
    offload: Literal["none", "cpu"] = "none"
    """Where shards rest between uses; `cpu` saves GPU memory at the price of copies. Needs stage 3."""
    deepspeed: Annotated[str, Field(min_length=1)] | None = None
    """Path of a DeepSpeed JSON configuration, in place of what `offload` says. Every node reads it. Needs stage 3."""

    @model_validator(mode="after")
    def only_shards_are_offloaded(self) -> ShardingConfig:
        """A replicated backbone is used in place, there is nothing to offload."""
        if self.offload != "none" and self.stage != 3:
            raise ValueError(
                f'offload = "{self.offload}" needs shards, but stage = {self.stage} replicates the backbone: '
                'set stage to 3, or offload to "none"'
            )
        return self

    @model_validator(mode="after")
    def a_file_is_about_shards(self) -> ShardingConfig:
        """DeepSpeed holds nothing but shards, and only one of the two can say where they rest."""
        if self.deepspeed is not None and self.stage != 3:
            raise ValueError(
                f'deepspeed = "{self.deepspeed}" is about shards, but stage = {self.stage} replicates the backbone: '
                "set stage to 3, or leave deepspeed out"
            )
        if self.deepspeed is not None and self.offload != "none":
            raise ValueError(
                f'deepspeed = "{self.deepspeed}" takes the place of offload = "{self.offload}": '
                'set offload to "none", or leave deepspeed out'
            )
        return self


class TrackingConfig(Settings):
    """Where MLflow writes."""

    uri: str | None = None
    """MLflow tracking URI; None is the database `mlflow.db` in `out_dir`."""
    experiment: Annotated[str, Field(min_length=1)] = "cortex"
    """MLflow experiment that the run is filed under."""
    system_metrics: bool = True
    """Also record CPU, memory, disk and network of the machine that drives the run."""
