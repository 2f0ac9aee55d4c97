"""How long a training step takes: what is computed, what is sent, and the two extremes of doing both.

Compute: multiplications and additions of the rehearsed step over the share of the GPU's peak that is achieved, but no
less than reading the weights of every unit once per visit from the GPU's own memory takes.

All-gather of a unit of b bytes over W workers, a ring: each GPU receives b (W - 1) / W over its link; between nodes the
ring enters each node with as much, over the network of that node. The slower of the two counts. DDP's all-reduce sends
P (W - 1) / W twice. Offloaded shards come from the node's memory, or disk, first, b / W on each GPU.

A unit is gathered whenever its turn comes after another one's: in every call of the backbone, forward, and backward
where a gradient goes through it. That is counted in the rehearsal (`Timeline.begins`), not assumed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cortex_core.backbone.shape import Shape
from cortex_core.training.rehearsal import Timeline
from pipelines.config import RunConfig
from pipelines.gpus import Hardware
from pipelines.zero3 import offload_of


class Time(NamedTuple):
    """One training step on one GPU."""

    flops: float
    """Multiplications and additions, all micro-batches."""
    gathers: int
    """All-gathers of a unit."""
    gathers_per_layer: float
    """The same for one layer, mean over layers."""
    gathered_bytes: float
    """What arrives by them."""
    compute_s: float
    gather_s: float
    host_s: float
    """Copies of offloaded shards."""
    all_reduce_s: float
    overlapped_s: float
    """Step if all transfers hide behind computing, or the other way round."""
    serial_s: float
    """Step if nothing overlaps."""
    tokens_per_s: float
    """Of the whole cluster, without overlap."""


def time_of(config: RunConfig, shape: Shape, timeline: Timeline, hardware: Hardware, tokens: int) -> Time:
    """Seconds of one step that reads `tokens` on all workers together. `timeline` is one micro-batch, of whole runs."""
    workers, parts = hardware.workers, config.training.accumulation_steps
    size = np.array([unit.numel for unit in shape.units], np.float64) * shape.dtype.itemsize
    visited = np.bincount(timeline.unit[timeline.begins], minlength=len(size)) * parts
    moved = float((visited * size).sum())
    flops = float(timeline.flops.sum()) * parts
    gpu, share = hardware.gpu, hardware.bandwidth_share
    narrow = shape.dtype.itemsize < 4 or config.training.autocast == "bfloat16"
    peak = 1e12 * (gpu.bfloat16_tflops if narrow else gpu.float32_tflops)
    compute = max(flops / (peak * hardware.flops_share), moved / (1e9 * gpu.memory_gb_s * share))
    sharded, offloaded = config.sharding.stage == 3, offload_of(config.sharding) != "none"
    received = moved * (workers - 1) / workers if sharded else 0.0
    sidecars = sum(p.numel() * p.element_size() for p in shape.model.sidecars.parameters())
    gather = received / _bytes_per_s(hardware)
    host = moved / workers / (1e9 * gpu.host_gb_s * share) if offloaded else 0.0
    reduce = 2 * sidecars * (workers - 1) / workers / _bytes_per_s(hardware)
    layers = np.array([unit.layer for unit in shape.units])
    transfers, many = gather + host + reduce, sharded and workers > 1
    serial = compute + transfers
    return Time(
        flops, int(visited.sum()) if many else 0, float(visited[layers].sum() / shape.depth) if many else 0.0,
        received, compute, gather, host, reduce, max(compute, transfers), serial, tokens / serial,
    )  # fmt: skip


def _bytes_per_s(hardware: Hardware) -> float:
    """What a ring over all workers carries, each way."""
    network = hardware.network_gbit_s * 1e9 / 8 if hardware.nodes > 1 else float("inf")
    return min(hardware.gpu.link_gb_s * 1e9, network) * hardware.bandwidth_share
