"""How many bytes of a GPU a training step takes: what rests there, and what comes and goes.

At rest: this rank's part of every frozen tensor, each rounded up to whole elements (`shard_numel`); of the sidecars,
which are whole on each rank, the weights P, their gradients, Adam's two moments and the weight average, P each, and
with more than one worker DDP's buckets, another P.

Comes and goes, operation by operation (`cortex_core.training.rehearsal`): what the step has made and still holds, and
the unit that is gathered. When it arrives, a unit of several tensors stands there twice: DeepSpeed receives all of them
in one buffer and copies each out of it. The sum is largest at one moment, and that is what has to fit.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cortex_core.backbone.shape import Shape, shard_numel, state_bytes
from cortex_core.training.rehearsal import Timeline
from pipelines.config import RunConfig
from pipelines.gpus import Hardware
from pipelines.zero3 import offload_of

COPIES = 5
"""Of the sidecars' weights, without DDP's buckets: weights, gradients, two moments, average."""


class Memory(NamedTuple):
    """Bytes of one GPU. `total_bytes` is the sum of the fields before it."""

    shards_bytes: int
    sidecars_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    """Adam's moments and the weight average."""
    buckets_bytes: int
    """What DDP collects gradients in."""
    gathered_bytes: int
    """The unit that is whole at the fullest moment, and the buffer it came in."""
    held_bytes: int
    """Gathered weights that the graph keeps from forward to backward pass because it saved views of them."""
    activations_bytes: int
    """All else that the step holds at that moment."""
    context_bytes: int
    margin_bytes: int
    total_bytes: int
    kept_bytes: dict[str, int]
    """Of the activations: what the forward pass leaves for the backward pass, by part (`rehearsal.PARTS`)."""
    session_bytes: int
    """State that a session keeps of one sequence; not part of the total."""
    host_bytes: int
    """Memory of a node, or disk, that offloaded shards take; not part of the total."""

    def fits(self, hardware: Hardware) -> bool:
        return self.total_bytes <= hardware.gpu.memory_bytes


def memory_of(config: RunConfig, shape: Shape, timeline: Timeline, hardware: Hardware) -> Memory:
    """Bytes of one GPU at the fullest moment of a step. `timeline` is of whole runs of layers (`Timeline.whole`)."""
    workers, element = hardware.workers, shape.dtype.itemsize
    sharded, offloaded = config.sharding.stage == 3, offload_of(config.sharding) != "none"
    shards = shard_numel(shape.units, workers if sharded else 1) * element
    sidecars = sum(p.numel() * p.element_size() for p in shape.model.sidecars.parameters())
    gathers = sharded and (workers > 1 or offloaded)
    gathered, live = _at_the_peak(shape, timeline, gathers)
    buffers = sum(b.numel() * b.element_size() for b in shape.model.buffers())
    held = _held_numel(shape, timeline) * element if gathers else 0
    parts = {
        "shards_bytes": (0 if offloaded else shards) + buffers,
        "sidecars_bytes": sidecars,
        "gradients_bytes": sidecars,
        "optimizer_bytes": (COPIES - 2) * sidecars,
        "buckets_bytes": sidecars if workers > 1 else 0,
        "gathered_bytes": gathered,
        "held_bytes": held,
        "activations_bytes": live,
    }
    parts["margin_bytes"] = round(hardware.margin_frac * sum(parts.values()))
    parts["context_bytes"] = round(hardware.context_bytes)
    return Memory(
        **parts, total_bytes=sum(parts.values()), kept_bytes=timeline.kept_bytes,
        session_bytes=state_bytes(shape.model), host_bytes=shards * hardware.gpus_per_node if offloaded else 0,
    )  # fmt: skip


def _at_the_peak(shape: Shape, timeline: Timeline, gathers: bool) -> tuple[int, int]:
    """Gathered and other bytes at the moment when they are most together."""
    live = timeline.live_bytes.sum(1)
    if not gathers:
        return 0, int(live.max())
    size = np.array([unit.numel for unit in shape.units] + [0]) * shape.dtype.itemsize
    several = np.array([len(unit.tensors) > 1 for unit in shape.units] + [False])
    gathered = size[timeline.unit] * (1 + (timeline.begins & several[timeline.unit]))
    at = int((live + gathered).argmax())
    return int(gathered[at]), int(live[at])


def _held_numel(shape: Shape, timeline: Timeline) -> int:
    return sum(held * unit.repeats for held, unit in zip(timeline.held_numel.tolist(), shape.units, strict=True))
