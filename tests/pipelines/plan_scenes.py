"""What the tests of `cortex plan` run in processes of their own: `python plan_scenes.py FOLDER CHECKPOINTING OUT`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cortex_core.config import BackboneConfig, FastWeightsConfig, OptimizerConfig, TrainingConfig
from cortex_core.training.batches import BatchShape
from cortex_core.training.loop import Learner
from cortex_core.training.objectives import ReadingLoss
from pipelines import worker
from pipelines.config import ClusterConfig, RunConfig, ShardingConfig
from pipelines.sharding import Shards, replicate
from tests.benchmarks.step_memory import kept_bytes, random_batch

RANKS, WIDTH, VOCABULARY = 2, 32, 96
PASSES = 5
"""What is kept is the least that is seen in so many: what one of gloo's threads lets go counts as kept, now and then."""
BATCH = BatchShape(rows=2, segments=3, width=WIDTH, windows=1, fillers=4, answers=6)


def run_config(folder: str, checkpointing: bool) -> RunConfig:
    """Of which `BATCH` is the micro-batch of one of two workers."""
    return RunConfig(
        backbone=BackboneConfig(name=folder, segment_tokens=WIDTH),
        fast_weights=FastWeightsConfig(rank=8, layers=(1,)),
        training=TrainingConfig(
            batch_size=RANKS * BATCH.rows, max_segments=BATCH.segments, in_window_batch_size=RANKS * BATCH.windows,
            gradient_checkpointing=checkpointing,
        ),
        tasks={"num_pairs": 1, "num_queries": BATCH.answers},  # type: ignore[arg-type]
        cluster=ClusterConfig(num_workers=RANKS), sharding=ShardingConfig(stage=3),
    )  # fmt: skip


def rank(folder: str, checkpointing: bool) -> dict[str, Any]:
    """One of two ranks: the product's own build and step, on random tokens."""
    torch.distributed.init_process_group("gloo")
    config = run_config(folder, checkpointing)
    model, shards = worker.build(config)
    objective = replicate(ReadingLoss(model, config.training))
    learner = Learner(model, objective, config.training, OptimizerConfig(), after_backward=shards.release)
    batch = random_batch(BATCH.batch(), VOCABULARY)
    learner.step([batch])
    at_rest = shards.resident_numel()
    kept = list[int]()
    for _ in range(PASSES):
        kept.append(kept_bytes(objective, batch))
        shards.release()
    counted = _count_gathers(shards)
    with shards.watch() as peak:
        learner.step([batch])
    return {
        "owned": shards.owned_numel, "total": shards.total_numel, "at_rest": at_rest, "gathers": counted(),
        "gathered_numel": peak.numel - shards.owned_numel, "kept": min(kept), "kept_each": kept,
    }  # fmt: skip


def _count_gathers(shards: Shards) -> Callable[[], int]:
    """From now on, how often a fetch made weights whole that were not."""
    residency, count = shards._residency, 0
    assert residency is not None

    def counting(fetch: Callable[..., Any]) -> Callable[..., Any]:
        def fetched(module: Any) -> Any:
            nonlocal count
            before = residency.gathered_numel()
            result = fetch(module)
            count += residency.gathered_numel() > before
            return result

        return fetched

    residency._fetch_forward = counting(residency._fetch_forward)
    residency._fetch_backward = counting(residency._fetch_backward)
    return lambda: count


if __name__ == "__main__":
    torch.set_num_threads(1)
    model_folder, checkpointed, out = sys.argv[1:]
    Path(out).write_text(json.dumps(rank(model_folder, checkpointed == "True")))
    torch.distributed.destroy_process_group()
