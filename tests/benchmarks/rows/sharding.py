"""Rows about the frozen backbone on two ranks: how much of it each holds, and that nothing comes out differently.

Two real processes that talk over gloo, each with one thread, run the product's own `worker.build`, `replicate`,
`ReadingLoss` and `Learner`. The largest value of both ranks counts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Set
from typing import Any

from tests.benchmarks import child
from tests.benchmarks.row import Row
from tests.benchmarks.rows.demo import SEED, Demo

SCENES = "tests.benchmarks.rows.two_ranks"
RANKS, STEPS = 2, 3
SHARE_GOAL, ERROR_GOAL, UNITS_GOAL = 0.51, 1e-5, 1.0
DEEP_LAYERS, DEEP_VOCABULARY, DEEP_WINDOW = 24, 128, 64
WHEN = ("at_rest", "after_step", "peak_backward")

UNITS_ROW = "gathered_units_at_peak"
DEMO_ROWS = (
    *(f"frozen_parameters_per_rank_{when}" for when in WHEN), UNITS_ROW,
    "sharded_vs_unsharded_loss_error", "sharded_vs_unsharded_gradient_error",
)  # fmt: skip
DEEP_ROWS = tuple(f"{row}_{DEEP_LAYERS}_layers" for row in ("frozen_parameters_per_rank_peak_backward", UNITS_ROW))


def sharding_of_the_demo(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Share of the demo backbone's weights that each of two ranks holds, and errors against an unsharded model.

    Elements as DeepSpeed's tensors tell, over three training steps on sequences of four segments; at the peak, the most
    that `Shards.watch` sees after a gather in the backward pass. Physics: a rank holds its half, and while a unit
    computes (a decoder layer, or a module outside the layers), that unit whole. So no peak is below 0.5 plus the
    largest unit's share: 0.3 for the demo backbone, whose embedding is that large, and gathered_units_at_peak (what is
    beyond the half, in largest units) cannot be below 1 where that unit is visited. Errors: loss and gradients of one
    batch, split over two ranks under ZeRO-3 and DDP, against the mean over both halves of an unsharded model in one
    process; relative, and for gradients the worst of all sidecar tensors.
    """
    ranks = child.run(f"{SCENES}:demo_scene", ranks=RANKS, run=str(demo.folder))
    for when in WHEN:
        name = f"frozen_parameters_per_rank_{when}"
        yield Row(name, _worst(ranks, when), SHARE_GOAL, "lower", "", 1 if when == "at_rest" else STEPS)
    yield Row(UNITS_ROW, _worst(ranks, "units_at_peak"), UNITS_GOAL, "lower", "units", STEPS)
    for what in ("loss_error", "gradient_error"):
        yield Row(f"sharded_vs_unsharded_{what}", _worst(ranks, what), ERROR_GOAL, "lower", "", 1)


def sharding_of_a_deep_model(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """The same peak on a random decoder of 24 layers, small in vocabulary: 0.5 plus one layer's share, 1/24.

    Without a goal for the share: with weights gathered a layer at a time, 0.51 needs a hundred layers.
    """
    from cortex_core.backbone.create import create_model

    with tempfile.TemporaryDirectory() as scratch:
        create_model(
            vocab_size=DEEP_VOCABULARY, hidden_size=64, num_layers=DEEP_LAYERS, num_heads=4, mlp_size=160,
            window_tokens=DEEP_WINDOW, rope_theta=1e4, tied_embeddings=True, seed=SEED,
        ).save_pretrained(scratch)  # fmt: skip
        ranks = child.run(f"{SCENES}:deep_scene", ranks=RANKS, folder=scratch)
    for name, what, goal in zip(DEEP_ROWS, ("peak_backward", "units_at_peak"), (None, UNITS_GOAL), strict=True):
        yield Row(name, _worst(ranks, what), goal, "lower", "units" if goal else "", STEPS)


def _worst(ranks: list[dict[str, Any]], what: str) -> float:
    return max(rank[what] for rank in ranks)
