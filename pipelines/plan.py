"""`cortex plan`: whether a run fits a cluster of GPUs, and how long a step takes, before either is there.

One process, no Ray, no GPU, no weights. The figures: `plan_memory`, `plan_time`; what to change: `plan_remedies`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from cortex_core.backbone.shape import Shape, shape_of
from cortex_core.config import BackboneConfig, FastWeightsConfig, OptimizerConfig, TrainingConfig
from cortex_core.training.batches import BatchShape
from cortex_core.training.rehearsal import Timeline, rehearse
from pipelines.config import RunConfig
from pipelines.gpus import Hardware
from pipelines.plan_memory import Memory, memory_of
from pipelines.plan_time import Time, time_of
from pipelines.sharding import frozen_linear


class Plan(NamedTuple):
    """One run on one cluster."""

    config: RunConfig
    hardware: Hardware
    batch: BatchShape
    memory: Memory
    time: Time
    total_numel: int
    """Frozen parameters of the whole backbone."""
    largest_unit_bytes: int
    """Weights that are gathered at once."""
    depth: int
    """Decoder layers."""
    layers: tuple[int, ...]
    """Numbers of those with a memory."""
    dtype: str

    @property
    def fits(self) -> bool:
        return self.memory.fits(self.hardware)


class Planner:
    """Makes plans, and remembers what it has rehearsed: plans of one backbone differ in few things."""

    def __init__(self, *, on_gpu: bool = True) -> None:
        self.on_gpu = on_gpu
        self._shapes: dict[Any, Shape] = {}
        self._timelines: dict[Any, Timeline] = {}

    def plan(self, config: RunConfig, hardware: Hardware) -> Plan:
        """Raises DataError, IncompatibleError, ConfigError: as `shape_of`."""
        batch, training = batch_shape(config, hardware.workers), config.training
        shape = self._shape(config.backbone, config.fast_weights, training.gradient_checkpointing)
        timeline = self._timeline(shape, batch, training, config.sharding.stage == 3)
        long = training.batch_size * batch.segments * batch.width
        windows = (batch.windows + batch.fillers) * hardware.workers * training.accumulation_steps
        tokens = long + 2 * windows * batch.width
        return Plan(
            config, hardware, batch,
            memory_of(config, shape, timeline, hardware), time_of(config, shape, timeline, hardware, tokens),
            shape.total_numel, max(unit.numel for unit in shape.units) * shape.dtype.itemsize, shape.depth,
            shape.memory_layers, str(shape.dtype).removeprefix("torch."),
        )  # fmt: skip

    def _shape(self, backbone: BackboneConfig, memory: FastWeightsConfig, checkpointing: bool) -> Shape:
        key = backbone, memory, checkpointing
        if key not in self._shapes:
            shape = shape_of(backbone, memory, _dtype(backbone))
            if checkpointing:
                shape.model.checkpoint_gradients()
            self._shapes[key] = shape
        return self._shapes[key]

    def _timeline(self, shape: Shape, batch: BatchShape, training: TrainingConfig, sharded: bool) -> Timeline:
        key = id(shape), batch, sharded, training.model_copy(update={"batch_size": 1, "accumulation_steps": 1})
        if key not in self._timelines:
            linear: Callable[..., Any] = frozen_linear if sharded else functional.linear
            found = rehearse(shape, batch, training, OptimizerConfig(), on_gpu=self.on_gpu, linear=linear)
            self._timelines[key] = found.whole(shape)
        return self._timelines[key]


def batch_shape(config: RunConfig, workers: int) -> BatchShape:
    """The longest micro-batch that training reads (`BatchSource`), on one of `workers`."""
    training, tasks = config.training, config.tasks
    parts = workers * training.accumulation_steps
    rows = training.batch_size // parts
    named = [name for name in tasks.names if name != "corpus"]
    kinds = set(tasks.fillers) if named else set()
    if len(named) < len(tasks.names):  # text that is to be remembered is no filler
        kinds -= {"text"}
    fillers = training.filler_windows * rows if kinds and training.sparsity_weight else 0
    return BatchShape(
        rows, training.max_segments, config.backbone.segment_tokens, training.in_window_batch_size // parts, fillers,
        tasks.num_queries, whole_text=len(named) < len(tasks.names),
    )  # fmt: skip


def _dtype(backbone: BackboneConfig) -> torch.dtype | None:
    if backbone.dtype == "auto":
        return None
    return torch.bfloat16 if backbone.dtype == "fast" else getattr(torch, backbone.dtype)


def run(config: RunConfig, hardware: Hardware, *, as_json: bool) -> int:
    """Print the plan and, if it does not fit, what to change. Returns 0 if it fits, 1 if it does not.

    Raises DataError, IncompatibleError, ConfigError for a backbone that cannot be planned with.
    """
    from rich.console import Console

    from pipelines.plan_remedies import Remedy, largest_batch, remedies
    from pipelines.plan_table import WIDTH, document, show

    planner, said = Planner(), Console(stderr=True)
    with said.status("Rehearsing a step"):
        plan = planner.plan(config, hardware)
        largest = largest_batch(planner, plan)
        changes: Sequence[Remedy] = () if plan.fits else remedies(planner, plan, largest)
    if as_json:
        print(json.dumps(document(plan, largest, changes), indent=2))
    else:
        show(Console(width=WIDTH), plan, largest, changes)
    return 0 if plan.fits else 1
