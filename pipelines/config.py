"""What one run is: the core's settings plus those of the edge, from a recipe and dotted overrides.

Layers, later wins: field default < recipe (TOML) < overrides `section.key=value`. The command line, a Tune
sample and an ablation all go through `load_config`. Nothing here imports torch or ray, so a wrong value is
answered at once.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from cortex_core.config import (
    BUILTIN,
    BackboneConfig,
    DataConfig,
    DreamConfig,
    EvaluationConfig,
    FastWeightsConfig,
    JudgeConfig,
    LifeConfig,
    MemoryGraphConfig,
    OptimizerConfig,
    PositiveInt,
    ReplayConfig,
    ScenarioConfig,
    Settings,
    SleepConfig,
    TasksConfig,
    TrainingConfig,
    ValidationConfig,
)
from pipelines.resolve import Overrides, resolve

CONFIG_FILE = "config.toml"
"""The resolved configuration, written into every run folder; `cortex evaluate` reads it."""
DATABASE_FILE = "mlflow.db"
"""MLflow's store, in `out_dir`."""
SIDECARS_FOLDER, EVALUATION = "sidecars", "evaluation.json"
"""What a run trained, in its folder once it has finished."""


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
        raise ValueError("names the run's folder: use letters, digits, '.', '_' and '-', not '.' first")
    return name


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


class RunConfig(Settings):
    """One run, completely: the same values give the same run."""

    name: Annotated[str, AfterValidator(_folder_name)] = "demo"
    """Name of the run and of its folder in `out_dir`. Starting it again under the same name resumes it."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the weights, of the tasks and of the order of the data."""
    out_dir: Annotated[str, Field(min_length=1)] = "runs"
    """Folder for everything that runs write; relative to where the command is started."""
    sidecars: Annotated[str, Field(min_length=1)] | None = None
    """Folder of trained sidecars, of the same `fast_weights`, that `cortex sleep` begins with: it sets this to those of
    the run it is given. Training begins with new ones."""
    backbone: BackboneConfig = BackboneConfig()
    """The frozen language model."""
    fast_weights: FastWeightsConfig = FastWeightsConfig()
    """The memory that is trained."""
    data: DataConfig = DataConfig()
    """Real text."""
    tasks: TasksConfig = TasksConfig()
    """What the memory is trained on."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How the sidecars are updated."""
    training: TrainingConfig = TrainingConfig()
    """Length, batch and objectives of the run."""
    validation: ValidationConfig = ValidationConfig()
    """What the model is asked while it is trained."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What the trained model is asked."""
    life: LifeConfig = LifeConfig()
    """Facts that are told by day: `cortex sleep`."""
    sleep: SleepConfig = SleepConfig()
    """How what was told moves into slow weights."""
    replay: ReplayConfig = ReplayConfig()
    """What is kept of earlier days for sleep."""
    memory_graph: MemoryGraphConfig = MemoryGraphConfig()
    """How what was written is linked, to be dreamed of: `cortex dream`, and `sleep.dream_frac`."""
    scenario: ScenarioConfig = ScenarioConfig()
    """What dreams are like."""
    judge: JudgeConfig = JudgeConfig()
    """Which dreams are learned from."""
    cluster: ClusterConfig = ClusterConfig()
    """Where the workers run."""
    sharding: ShardingConfig = ShardingConfig()
    """How the backbone is laid out over them."""
    tracking: TrackingConfig = TrackingConfig()
    """Where metrics go."""

    @property
    def run_dir(self) -> Path:
        """Absolute folder of this run: configuration, checkpoints, report."""
        return Path(self.out_dir).absolute() / self.name

    @property
    def tracking_uri(self) -> str:
        """MLflow's store. Absolute, because Ray's workers run in another folder."""
        return self.tracking.uri or f"sqlite:///{Path(self.out_dir).absolute() / DATABASE_FILE}"

    @property
    def dream(self) -> DreamConfig:
        """Everything about dreams."""
        return DreamConfig(graph=self.memory_graph, scenario=self.scenario, judge=self.judge, seed=self.seed)

    @property
    def world_sizes(self) -> tuple[int, ...]:
        """Numbers of workers that the run may have, ascending: with each, all get as many rows in every micro-batch."""
        training, (_, fewest) = self.training, self.cluster.needed_workers
        sizes = (training.batch_size, training.in_window_batch_size)
        return tuple(
            workers
            for workers in range(max(fewest, 1), max(self.cluster.num_workers, 1) + 1)
            if not any(size % (workers * training.accumulation_steps) for size in sizes)
        )

    @model_validator(mode="after")
    def batches_divide_evenly(self) -> RunConfig:
        """Every worker gets as many rows in every micro-batch, or gradients would be weighted wrongly."""
        cluster, steps = self.cluster, self.training.accumulation_steps
        bounds = {"cluster.min_workers": cluster.min_workers, "cluster.num_workers": max(cluster.num_workers, 1)}
        bounds = {name: workers for name, workers in bounds.items() if workers is not None}
        parts, names = math.lcm(*bounds.values()) * steps, ("batch_size", "in_window_batch_size")
        uneven = {f"training.{name}": size for name in names if (size := getattr(self.training, name)) % parts}
        if uneven:
            raise ValueError(
                f"{' and '.join(f'{name} = {size}' for name, size in uneven.items())}: must be a multiple of {parts} "
                f"({' and '.join(f'{name} = {workers}' for name, workers in bounds.items())} x "
                f"training.accumulation_steps = {steps}). Set "
                f"{' '.join(f'{name}={math.ceil(size / parts) * parts}' for name, size in uneven.items())}, "
                "or change the number of workers"
            )
        return self

    @model_validator(mode="after")
    def questions_fit_the_window(self) -> RunConfig:
        """All lines of an example share one window; two where no in-window sequences are trained on.

        A line has 4 tokens at least. How many the tokenizer makes of it, `cortex_core.tasks.mixture.check_tasks` knows.
        """
        tasks, windows = self.tasks, 1 if self.training.in_window_batch_size else 2
        room, needed = windows * self.backbone.segment_tokens, 4 * (tasks.num_pairs + tasks.num_queries)
        if "key_value" in tasks.names and needed > room:
            fewer = room // 4 - tasks.num_pairs
            remedy = f"Set tasks.num_queries={fewer} or less" if fewer > 0 else "Lower both"
            raise ValueError(
                f"tasks.num_queries = {tasks.num_queries} with tasks.num_pairs = {tasks.num_pairs}: take at least "
                f"{needed} tokens, must be at most {room} ({windows} x backbone.segment_tokens). {remedy}, or raise "
                "backbone.segment_tokens"
            )
        return self


def located(config: RunConfig) -> RunConfig:
    """The same run with `~` expanded and paths made absolute: Ray's workers run in a folder of their own.

    `backbone.name` is a folder if there is one of that name; otherwise it is a hub id, or ships with the package.
    """
    path, name, deepspeed = config.data.path, config.backbone.name, config.sharding.deepspeed
    if config.sidecars is not None and not config.sidecars.startswith(BUILTIN):
        config = config.model_copy(update={"sidecars": str(_absolute(config.sidecars))})
    folder = _absolute(name)
    if path is not None:
        config = config.model_copy(update={"data": config.data.model_copy(update={"path": str(_absolute(path))})})
    if deepspeed is not None:
        sharding = config.sharding.model_copy(update={"deepspeed": str(_absolute(deepspeed))})
        config = config.model_copy(update={"sharding": sharding})
    if not name.startswith(BUILTIN) and folder.is_dir():
        config = config.model_copy(update={"backbone": config.backbone.model_copy(update={"name": str(folder)})})
    return config


def _absolute(path: str) -> Path:
    return Path(os.path.expanduser(path)).absolute()


def load_config(recipe: str | Path | None = None, overrides: Overrides = ()) -> RunConfig:
    """`resolve` for a run."""
    return resolve(RunConfig, recipe, overrides)
