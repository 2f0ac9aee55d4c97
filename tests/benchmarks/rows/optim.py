"""Rows about APOLLO beside AdamW: what a small language model learns with each, what they keep, and what a step takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Set
from typing import TYPE_CHECKING

from tests.benchmarks import pairs
from tests.benchmarks.row import Row
from tests.benchmarks.rows.demo import Demo

if TYPE_CHECKING:
    from tests.benchmarks.optimizer_runs import Losses

PERPLEXITY_ROWS = ("apollo_mini_perplexity_over_adamw", "apollo_perplexity_over_adamw")
SHARE_ROW, STEP_ROW, UPDATE_ROW = (
    "apollo_mini_state_share",
    "apollo_mini_step_over_adamw",
    "apollo_mini_update_over_adamw",
)
COST_ROWS = (SHARE_ROW, STEP_ROW, UPDATE_ROW)
ROWS = (*PERPLEXITY_ROWS, *COST_ROWS)
PERPLEXITY_GOAL, SHARE_GOAL, STEP_GOAL = 1.005, 0.02, 1.1
SEEDS, STEP_PAIRS = range(6), 25
CENTRES = {"adamw": 4e-3, "apollo": 32e-3, "apollo_mini": 16e-3 * 2**0.5}
"""Where the search for each one's learning rate begins."""
FACTOR, REACH = 2**0.5, 2
"""Of the grid of learning rates: from one to the next, and how many on either side of the best one are tried."""


def perplexity(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Perplexity on held-out files of a small language model that APOLLO trained, over one that AdamW trained.

    The shipped backbone's architecture and tokenizer, fresh weights, 300 steps of 8 windows of 128 tokens of the standard
    library's sources; warm-up, decay, betas, weight decay and clipping as in `cortex pretrain`. Each optimizer at the best
    of five learning rates, root 2 apart, the best in the middle, chosen by the mean loss on validation files over six
    seeds (of weights and data); mean of the differences in nats per token and its t interval over the seeds, as a ratio.
    One process, one thread.
    """
    from cortex_core.config import UpdateConfig
    from cortex_core.intervals import mean_interval
    from tests.benchmarks import optimizer_runs

    names = {row: row.removesuffix("_perplexity_over_adamw") for row in PERPLEXITY_ROWS if row in wanted}
    found: dict[str, list[float]] = {}
    with pairs.one_thread():
        for name in ("adamw", *names.values()):
            update = UpdateConfig.model_validate({"name": name})
            found[name] = [
                run.held_out
                for run in best_runs(lambda rate, seed, u=update: optimizer_runs.train(u, rate, seed), CENTRES[name])
            ]
    for row, name in names.items():
        both = zip(found[name], found["adamw"], strict=True)
        ratio = mean_interval([ours - theirs for ours, theirs in both])
        value, low, high = (math.exp(x) for x in (ratio.value, ratio.low, ratio.high))
        yield Row(row, value, PERPLEXITY_GOAL, "lower", "", len(SEEDS), low, high)


def cost(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """State that APOLLO-Mini keeps for the shipped backbone, as a share of AdamW's, and its training step's time over AdamW's.

    State: all numbers in it, steps and norms counted. A step: 8 windows of 128 tokens forward and backward, clipping and
    the update; and the update alone, without a goal. Each optimizer has a model of its own; 25 pairs in one process,
    alternately, one thread, median with its 95 % interval.
    """
    from cortex_core.config import UpdateConfig
    from tests.benchmarks import optimizer_runs

    with pairs.one_thread():
        ours, theirs = (optimizer_runs.Trained(UpdateConfig(name=name), seed=0) for name in ("apollo_mini", "adamw"))
        for trained in (ours, theirs):
            trained.step(1e-4)
        if SHARE_ROW in wanted:
            yield Row(SHARE_ROW, ours.state_numbers / theirs.state_numbers, SHARE_GOAL, "lower", "", 1)
        ways = {
            STEP_ROW: (lambda: ours.step(1e-4), lambda: theirs.step(1e-4), STEP_GOAL),
            UPDATE_ROW: (ours.optimizer.step, theirs.optimizer.step, None),
        }
        for name, (first, second, goal) in ways.items():
            if name in wanted:
                ratio = pairs.median(pairs.ratios(first, second, pairs=STEP_PAIRS))
                yield Row(name, ratio.value, goal, "lower", "", ratio.n, ratio.low, ratio.high)


def best_runs(train: Callable[[float, int], Losses], centre: float) -> list[Losses]:
    """What `train` (of a learning rate and a seed) gives with each seed at the rate whose validation loss is least, in
    the mean over the seeds: a rate that is just stable with one of them need not be with another.

    The grid is centred on the best rate: it moves until as many rates lie on one side of it as on the other.
    """
    found: dict[int, list[Losses]] = {}
    best = 0
    while missing := [place for place in range(best - REACH, best + REACH + 1) if place not in found]:
        for place in missing:
            found[place] = [train(centre * FACTOR**place, seed) for seed in SEEDS]
        best = min(found, key=lambda place: sum(run.validation for run in found[place]))
    return found[best]
