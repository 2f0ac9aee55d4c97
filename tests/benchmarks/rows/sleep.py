"""Rows about sleep: what was told by day is known when the fast weights are empty, and text is read as before."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Set
from typing import TYPE_CHECKING

from cortex_core.config import LifeConfig, ReplayConfig, SleepConfig
from cortex_core.intervals import mean_interval, wilson
from tests.benchmarks.row import Row
from tests.benchmarks.rows.demo import Demo

if TYPE_CHECKING:
    from cortex_core.training.life import Life

SEEDS, TEXT_ROWS, TEXT_TOKENS = (0, 1, 2), 64, 1024
RECALL_GOAL, PERPLEXITY_GOAL_PERCENT = 0.95, 0.5
LIFE_ROWS = (
    "facts_known_after_sleep",
    "facts_known_before_sleep",
    "facts_of_first_days_known_after_sleep",
    "nights_undone",
    "text_perplexity_after_sleep_percent",
)


def lives_of_facts(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Of 200 facts told in 25 days, the share that is known after the last night with empty fast weights.

    Three lives with facts and held-out text of their own, each from the demo's memory and under the settings' defaults.
    Every fact is asked at once, after 40 and after 200 tokens of other held-out text: the share is of all answers, its
    Wilson interval that of one answer per fact. `before`: the same questions before the first day; `first_days`: of the
    100 facts told first. Perplexity of 64 x 1,024 tokens of held-out text with empty fast weights and all slow weights
    over the bare model's, in percent, with a 95 % interval over rows and lives.
    """
    import torch

    from cortex_core.eval.perplexity import text_loss

    text = torch.as_tensor(demo.excerpts(TEXT_ROWS, TEXT_TOKENS))
    before, after, first, differences = [], [], [], list[float]()
    nights = undone = 0
    for seed in SEEDS:
        life = new_life(demo, LifeConfig(seed=seed))
        before.append(known(life))
        nights += sum(len(day.nights) for day in life.live())
        undone += life.sleeper.num_undone
        after.append(known(life))
        first.append(after[-1][: len(after[-1]) // 2])
        losses = text_loss(life.sleeper.model, text)
        differences += (losses.with_memory - losses.bare).tolist()
    for name, shares, goal in (
        (LIFE_ROWS[0], after, RECALL_GOAL), (LIFE_ROWS[1], before, None), (LIFE_ROWS[2], first, None),
    ):  # fmt: skip
        pooled = [share for life_shares in shares for share in life_shares]
        low, high, value = wilson(sum(pooled), len(pooled))
        yield Row(name, value, goal, "lower" if name == LIFE_ROWS[1] else "higher", "", len(pooled), low, high)
    low, high, value = wilson(undone, nights)
    yield Row(LIFE_ROWS[3], value, None, "lower", "", nights, low, high)
    low, high, value = (100 * math.expm1(x) for x in mean_interval(differences))
    yield Row(LIFE_ROWS[4], value, PERPLEXITY_GOAL_PERCENT, "lower", "%", len(differences), low, high)


def new_life(
    demo: Demo, config: LifeConfig, sleep: SleepConfig | None = None, replay: ReplayConfig | None = None
) -> Life:
    """One that has not begun, of a model of its own with the demo's memory."""
    from cortex_core.tasks.filler import TextFiller
    from cortex_core.training.life import Life, new_sleeper

    def encode(text: str) -> list[int]:
        return demo.tokenizer(text, add_special_tokens=False).input_ids

    sleeper = new_sleeper(
        copy.deepcopy(demo.model), encode, demo.corpus, sleep or SleepConfig(), replay or ReplayConfig()
    )
    return Life(sleeper, config, demo.vocabulary, TextFiller(demo.corpus, "held_out"))


def known(life: Life) -> list[float]:
    """Of each fact, the share of the places in which the model knows it."""
    return [sum(places) / len(places) for places in zip(*life.known(), strict=True)]
