"""Rows about `cortex plan`: how far what it says of a step's memory is from what a step takes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

from tests.benchmarks.row import Row
from tests.benchmarks.rows.demo import SEED, Demo

SHAPES: dict[str, dict[str, Any]] = {
    "narrow": {"vocab_size": 512, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "mlp_size": 160,
               "tied_embeddings": True, "window_tokens": 64},
    "deep": {"vocab_size": 2048, "hidden_size": 192, "num_layers": 8, "num_heads": 6, "mlp_size": 512,
             "tied_embeddings": False, "window_tokens": 128},
}  # fmt: skip
GOAL_PERCENT = 10.0
ROWS = tuple(f"plan_error_percent_{shape}" for shape in SHAPES)


def plan_error_percent(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Largest error of `cortex plan` about a real step's bytes, over its parts and their sum, in percent.

    Two fresh models, narrow and deep, on this machine's processor, without shards; each with everything kept for the
    backward pass and with gradient checkpointing. Parts: frozen weights, sidecars, gradients, optimizer and average,
    what the forward pass leaves, the most that a step holds (torch's allocator), a session's state.
    """
    for name, shape in zip(ROWS, SHAPES, strict=True):
        if name in wanted:
            errors = []
            for checkpointing in (False, True):
                with tempfile.TemporaryDirectory() as scratch:
                    compared = compare(Path(scratch), shape, checkpointing)
                errors += [100 * abs(planned / measured - 1) for planned, measured in compared.values()]
            yield Row(name, max(errors), GOAL_PERCENT, "lower", "%", len(errors))


def compare(folder: Path, shape: str, checkpointing: bool) -> dict[str, tuple[int, int]]:
    """Bytes of each part of a training step of one of `SHAPES`, as planned and as measured."""
    from cortex_core.backbone.create import create_model
    from cortex_core.config import BackboneConfig, FastWeightsConfig, TrainingConfig
    from pipelines import worker
    from pipelines.config import ClusterConfig, RunConfig, ShardingConfig
    from pipelines.gpus import GPUS, Hardware
    from pipelines.plan import Planner
    from tests.benchmarks.step_memory import measure, random_batch

    sizes = SHAPES[shape]
    create_model(**sizes, rope_theta=1e4, seed=SEED).save_pretrained(folder)
    config = RunConfig(
        backbone=BackboneConfig(name=str(folder), segment_tokens=sizes["window_tokens"]),
        fast_weights=FastWeightsConfig(rank=16),
        training=TrainingConfig(
            batch_size=2, max_segments=3, in_window_batch_size=1, gradient_checkpointing=checkpointing
        ),
        cluster=ClusterConfig(num_workers=1),
        sharding=ShardingConfig(stage=0),
    )
    hardware = Hardware(GPUS["h100"], 1, 1, 400.0, 0.4, 0.7, context_bytes=0.0, margin_frac=0.0)
    plan = Planner(on_gpu=False).plan(config, hardware)
    model, shards = worker.build(config)
    got = measure(model, random_batch(plan.batch.batch(), sizes["vocab_size"]), config.training)
    weights = 4 * shards.owned_numel
    memory = plan.memory
    return {
        "shards": (memory.shards_bytes, weights),
        "sidecars": (memory.sidecars_bytes, got.sidecars),
        "gradients": (memory.gradients_bytes, got.gradients),
        "optimizer": (memory.optimizer_bytes, got.optimizer),
        "kept": (sum(memory.kept_bytes.values()), got.kept),
        "activations": (memory.activations_bytes, got.activations),
        "session": (memory.session_bytes, got.session),
        "total": (memory.total_bytes, weights + got.sidecars + got.gradients + got.optimizer + got.activations),
    }
