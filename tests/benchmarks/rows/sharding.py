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

DEMO_ROWS = (
    *(f"frozen_parameters_per_rank_{when}" for when in WHEN), "gathered_modules_at_peak",
    "sharded_vs_unsharded_loss_error", "sharded_vs_unsharded_gradient_error",
)  # fmt: skip
DEEP_ROW = f"frozen_parameters_per_rank_peak_backward_{DEEP_LAYERS}_layers"


def sharding_of_the_demo(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Share of the demo backbone's weights that a rank of two holds, as DeepSpeed's tensors tell, and errors against an unsharded process.

    Three training steps over sequences of four segments; at the peak, what `Shards.watch` sees after every gather.
    Physics: a rank holds its half, and while a module computes, that module's weights whole. So a peak cannot be lower than
    0.5 plus the largest module's share, 0.3 for the embedding of the demo backbone; gathered_modules_at_peak is the peak
    minus the half, in largest modules: 1 is the least there can be. Errors: loss and gradients of one batch, split over two
    ranks under ZeRO-3 and DDP, against the mean over both halves in a single unsharded process; relative, and for gradients
    the worst of all sidecar tensors.
    """
    ranks = child.run(f"{SCENES}:demo_scene", ranks=RANKS, run=str(demo.folder))
    for when in WHEN:
        name = f"frozen_parameters_per_rank_{when}"
        yield Row(name, _worst(ranks, when), SHARE_GOAL, "lower", "", 1 if when == "at_rest" else STEPS)
    units = max((rank["peak_backward"] - rank["at_rest"]) / rank["largest_module"] for rank in ranks)
    yield Row("gathered_modules_at_peak", units, UNITS_GOAL, "lower", "", STEPS)
    for what in ("loss", "gradient"):
        yield Row(
            f"sharded_vs_unsharded_{what}_error",
            _worst(ranks, f"{what}_error"),
            ERROR_GOAL,
            "lower",
            "",
            RANKS,
        )


def sharding_of_a_deep_model(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """The same peak on a random decoder of 24 layers with 128 tokens of vocabulary, where no module is a large part of the whole."""
    from cortex_core.backbone.create import create_model

    with tempfile.TemporaryDirectory() as scratch:
        create_model(
            vocab_size=DEEP_VOCABULARY, hidden_size=64, num_layers=DEEP_LAYERS, num_heads=4, mlp_size=160,
            window_tokens=DEEP_WINDOW, rope_theta=1e4, tied_embeddings=True, seed=SEED,
        ).save_pretrained(scratch)  # fmt: skip
        ranks = child.run(f"{SCENES}:deep_scene", ranks=RANKS, folder=scratch)
    yield Row(DEEP_ROW, _worst(ranks, "peak_backward"), SHARE_GOAL, "lower", "", STEPS)


def _worst(ranks: list[dict[str, Any]], what: str) -> float:
    return max(rank[what] for rank in ranks)
