"""Rows about what the machinery costs: a step under Ray Train, shards, checkpoints, loading; beside plain torch."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Set

from tests.benchmarks import child, pairs
from tests.benchmarks.row import Row
from tests.benchmarks.rows.demo import SEED, Demo

SCENES = "tests.benchmarks.rows.two_workers"
PIPELINE_ROW, SHARDED_ROW = "pipeline_step_over_ddp", "sharded_step_over_replicated"
CHECKPOINT_ROWS = (
    "checkpoint_bytes_over_training_state", "checkpoint_bytes_over_sidecars", "checkpoint_seconds_over_step",
)  # fmt: skip
LOADING_ROWS = ("loading_peak_share", "loading_private_peak_share")
STEP_GOAL, BYTES_GOAL, WHOLE = 1.05, 1.2, 1.0
HIDDEN, LAYERS, FILE_BYTES = 1024, 12, "100MB"


def pipeline_step_over_ddp(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Seconds of the pipeline's training steps, over those of a plain loop with DDP, on two workers of Ray Train.

    The pipeline's: data, step, weight average, means over workers, reports every 10 steps to Ray Train's controller, a
    checkpoint every 20 (by default it is every 50). The plain loop: the same data, loss, clipping and AdamW. Replicated
    backbone, whole segments, the same steps of the demo's settings. Blocks of 20 steps in the same two processes,
    alternately; 9 pairs, median with its 95 % interval.
    """
    (found,) = child.run(f"{SCENES}:pipeline_and_ddp", run=str(demo.folder))
    ratio = pairs.median(found)
    yield Row(PIPELINE_ROW, ratio.value, STEP_GOAL, "lower", "", ratio.n, ratio.low, ratio.high)


def sharded_step_over_replicated(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Seconds of a training step with the demo's backbone split over two ranks (ZeRO-3), over those with it whole.

    Two processes over gloo, one thread each, the same batches. Blocks of 5 steps, alternately; 9 pairs, median with its
    95 % interval. Without a goal: it is the price of the memory, and on one machine nothing is won by it.
    """
    found, _ = child.run(f"{SCENES}:sharded_and_replicated", ranks=2, run=str(demo.folder))
    ratio = pairs.median(found)
    yield Row(SHARDED_ROW, ratio.value, None, "lower", "", ratio.n, ratio.low, ratio.high)


def checkpoints(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Bytes of a checkpoint on the way, over the state that a run needs to go on, and over the sidecars; its time.

    The state: the sidecars' weights, their averages and Adam's two moments, four numbers of four bytes per weight. So
    the second row cannot be below 4, as long as a run that was interrupted is to go on as if it had not been. The third:
    seconds of writing one to a local disk over those of one training step of the demo, one worker; 9 pairs, median with
    its 95 % interval.
    """
    (found,) = child.run(f"{SCENES}:checkpoint", run=str(demo.folder))
    for name, over in zip(CHECKPOINT_ROWS, ("state_bytes", "sidecar_bytes"), strict=False):
        yield Row(name, found["bytes"] / found[over], BYTES_GOAL, "lower", "x", 1)
    ratio = pairs.median(found["ratios"])
    yield Row(CHECKPOINT_ROWS[-1], ratio.value, None, "lower", "", ratio.n, ratio.low, ratio.high)


def loading_shard_by_shard(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Peak memory that loading a backbone under ZeRO-3 adds to a rank of two, as a share of the whole backbone.

    A random decoder of 620 MB in float32, in files of 100 MB; each rank ends up with half. The first row is resident
    memory (VmHWM), in which the files' pages count that the kernel may take back; the second what belongs to the process
    (RssAnon and RssShmem, looked at every millisecond). The worse of both ranks.
    """
    from cortex_core.backbone.create import create_model

    with tempfile.TemporaryDirectory() as scratch:
        model = create_model(
            vocab_size=4096, hidden_size=HIDDEN, num_layers=LAYERS, num_heads=16, mlp_size=2816,
            window_tokens=128, rope_theta=1e4, tied_embeddings=True, seed=SEED,
        )  # fmt: skip
        model.save_pretrained(scratch, max_shard_size=FILE_BYTES)
        del model
        ranks = child.run(f"{SCENES}:loading", ranks=2, folder=scratch)
    for name, what in zip(LOADING_ROWS, ("resident", "private"), strict=True):
        yield Row(name, max(rank[what] for rank in ranks), WHOLE, "lower", "", 1)
