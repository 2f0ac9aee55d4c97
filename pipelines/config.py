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
    CodesConfig,
    DataConfig,
    DreamConfig,
    EvaluationConfig,
    FastWeightsConfig,
    FisherConfig,
    JudgeConfig,
    LifeConfig,
    MemoryGraphConfig,
    OptimizerConfig,
    ReplayConfig,
    ScalingConfig,
    ScenarioConfig,
    SegmentsConfig,
    Settings,
    SleepConfig,
    TasksConfig,
    TrainingConfig,
    UnfreezeConfig,
    ValidationConfig,
)
from pipelines.actor_config import NightsConfig, PoolConfig
from pipelines.cluster_config import ClusterConfig, ShardingConfig, TrackingConfig
from pipelines.resolve import Overrides, resolve

CONFIG_FILE = "config.toml"
"""The resolved configuration, written into every run folder; `cortex evaluate` reads it."""
DATABASE_FILE = "mlflow.db"
"""MLflow's store, in `out_dir`."""
SIDECARS_FOLDER, EVALUATION = "sidecars", "evaluation.json"
"""What a run trained, in its folder once it has finished."""
CODER = "codes.safetensors"
"""Of `stage=codes`: encoder and decoder."""
LIFE, MEMORIES = "life.json", "memories.safetensors"
"""Of a life that was led: what is known of it, in the last checkpoint, and what was written."""


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
        raise ValueError("names the run's folder: use letters, digits, '.', '_' and '-', not '.' first")
    return name


class RunConfig(Settings):
    """One run, completely: the same values give the same run."""

    name: Annotated[str, AfterValidator(_folder_name)] = "demo"
    """Name of the run and of its folder in `out_dir`. Starting it again under the same name resumes it."""
    stage: Literal["memory", "codes", "sleep"] = "memory"
    """What `cortex train` trains: the memory; codes of what a trained one reads; or slow weights (`sleep.place`) in a
    life of facts, as `cortex sleep` does. Stages follow one another by `sidecars`."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the weights, of the tasks and of the order of the data."""
    out_dir: Annotated[str, Field(min_length=1)] = "runs"
    """Folder for everything that runs write; relative to where the command is started."""
    sidecars: Annotated[str, Field(min_length=1)] | None = None
    """Folder of trained sidecars to begin with, or `builtin:...`; null begins with new ones. `fast_weights` are theirs.
    `cortex sleep` sets it to those of the run it is given."""
    coder: Annotated[str, Field(min_length=1)] | None = None
    """File that `stage=codes` has left, codes.safetensors: nights go on training it on what they have read; null has
    none. What is learned of facts does not depend on it."""
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
    segments: SegmentsConfig = SegmentsConfig()
    """Which parts of a text are surprising enough to be kept, with `stage=codes`."""
    codes: CodesConfig = CodesConfig()
    """What a few numbers keep of such a part, with `stage=codes`."""
    unfreeze: UnfreezeConfig = UnfreezeConfig()
    """How the backbone may change by night, with `sleep.place=backbone`."""
    fisher: FisherConfig = FisherConfig()
    """How firmly slow weights are held to what earlier nights have learned."""
    scaling: ScalingConfig = ScalingConfig()
    """Synaptic scaling of slow weights, after each night."""
    replay: ReplayConfig = ReplayConfig()
    """What is kept of earlier days for sleep."""
    memory_graph: MemoryGraphConfig = MemoryGraphConfig()
    """How what was written is linked, to be dreamed of: `cortex dream`, and `sleep.dream_frac`."""
    scenario: ScenarioConfig = ScenarioConfig()
    """What dreams are like."""
    judge: JudgeConfig = JudgeConfig()
    """Which dreams are learned from."""
    sleep_actor: NightsConfig = NightsConfig()
    """Who sleeps beside training, if `life.beside_training`."""
    dream_actors: PoolConfig = PoolConfig()
    """Who dreams beside training, if there are to be dreams."""
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

    @property
    def dreams_beside_training(self) -> bool:
        """Whether dreams are made while the memory is trained."""
        return self.life.beside_training and self.sleep.dream_frac > 0

    @model_validator(mode="after")
    def a_life_begins_with_a_memory(self) -> RunConfig:
        """A memory that cannot write yet has nothing to sleep on; and a night takes its dreams at once."""
        if self.stage != "memory" and self.sidecars is None:
            raise ValueError(
                f'stage = "{self.stage}": begins with a memory that is trained. Set sidecars to those of a run: '
                "sidecars=runs/demo/sidecars"
            )
        if self.life.beside_training and self.sidecars is None:
            raise ValueError(
                "life.beside_training = true: needs a memory that can write already. Set sidecars to those of a run: "
                "sidecars=runs/demo/sidecars"
            )
        if self.life.beside_training and self.sleep.place == "backbone":
            raise ValueError(
                'sleep.place = "backbone": must be "slow_weights" beside training, which is there that the backbone '
                "stays as it is. Use cortex sleep, or set life.beside_training=false"
            )
        if self.dreams_beside_training and self.sleep.dreams_per_night > self.dream_actors.queue_items:
            raise ValueError(
                f"sleep.dreams_per_night = {self.sleep.dreams_per_night}: must be at most "
                f"{self.dream_actors.queue_items}, dream_actors.queue_items. Lower it, or raise that"
            )
        return self

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
    if config.coder is not None:
        config = config.model_copy(update={"coder": str(_absolute(config.coder))})
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
