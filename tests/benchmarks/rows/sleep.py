"""Rows about sleep: what was told by day is known when the fast weights are empty, and text is read as before."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Set
from typing import TYPE_CHECKING

from cortex_core.config import DreamConfig, LifeConfig, ReplayConfig, ScenarioConfig, SleepConfig
from cortex_core.intervals import mean_interval, wilson
from tests.benchmarks.row import Row
from tests.benchmarks.rows.demo import Demo

if TYPE_CHECKING:
    from cortex_core.training.life import Life

SEEDS, TEXT_ROWS, TEXT_TOKENS = (0, 1, 2), 64, 1024
RECALL_GOAL, PERPLEXITY_GOAL_PERCENT = 0.95, 0.5
WAYS: dict[str, dict[str, float]] = {"dreamed": {"dream_frac": 1.0}, "real": {}, "none": {"replayed": 0}}
BRIEF, NUM_DREAMS = ScenarioConfig(max_filler_tokens=24, max_lines=2), 400
DREAM_GOAL, PRECISION_GOAL, YIELD_GOAL = 0.98, 0.99, 0.5
DREAM_ROWS = (
    "dreams_over_real_replay",
    "facts_known_after_sleep_on_dreams",
    "facts_known_after_sleep_without_replay",
    "judge_precision",
    "judge_yield",
)
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


def dreams_for_lessons(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Lives of 200 facts that replay dreams and keep no old lesson, beside lives that replay old lessons, and none.

    Three lives each, the same facts and days; asked as in `lives_of_facts`. The ratio is of the shares known, its
    interval Student's over the lives. Then each model that lived on dreams dreams 400 times of all that it has written:
    the judge's precision and yield, against the book of facts, which it has not seen, with Wilson intervals.
    """
    from cortex_core.dreaming.dream import Dreamer
    from cortex_core.dreaming.judge import judge
    from cortex_core.dreaming.ngrams import NgramSet
    from cortex_core.training.dreams import Dreams

    shares: dict[str, list[float]] = {"dreamed": [], "real": [], "none": []}
    kept = right = dreamt = 0
    known_text = NgramSet.empty(4, 24).with_rows([demo.corpus.train])
    for seed in SEEDS:
        for name, changes in WAYS.items():
            life = new_life(demo, LifeConfig(seed=seed), SleepConfig(**changes), scenario=BRIEF)
            for _ in life.live():
                pass
            found = known(life)
            shares[name].append(sum(found) / len(found))
            dreams = life.sleeper.dreams
            if name != "dreamed" or not isinstance(dreams, Dreams):
                continue
            dreamer = Dreamer(life.sleeper.model, dreams.graph, DreamConfig(seed=seed + 100), model_version="all")
            made = dreamer.dream(range(NUM_DREAMS))
            verdicts, _ = judge(made, dreams.graph.record, dreamer.config.judge, corpus=known_text)
            truth = {(*life.book.question(fact),): (fact.value,) for fact in life.book.facts}
            passed = [dream for dream, verdict in zip(made, verdicts, strict=True) if verdict.passed]
            dreamt, kept = dreamt + len(made), kept + len(passed)
            right += sum(truth.get(dream.question) == dream.answer.tokens for dream in passed)
    ratios = [dreamed / real for dreamed, real in zip(shares["dreamed"], shares["real"], strict=True)]
    low, high, value = mean_interval(ratios)
    yield Row(DREAM_ROWS[0], value, DREAM_GOAL, "higher", "", len(ratios), low, high)
    for row, name in ((DREAM_ROWS[1], "dreamed"), (DREAM_ROWS[2], "none")):
        low, high, value = mean_interval(shares[name], lowest=0.0, highest=1.0)
        yield Row(row, value, None, "higher", "", len(SEEDS), low, high)
    low, high, value = wilson(right, kept)
    yield Row(DREAM_ROWS[3], value, PRECISION_GOAL, "higher", "", kept, low, high)
    low, high, value = wilson(kept, dreamt)
    yield Row(DREAM_ROWS[4], value, YIELD_GOAL, "higher", "", dreamt, low, high)


def new_life(
    demo: Demo,
    config: LifeConfig,
    sleep: SleepConfig | None = None,
    replay: ReplayConfig | None = None,
    scenario: ScenarioConfig | None = None,
) -> Life:
    """One that has not begun, of a model of its own with the demo's memory."""
    from cortex_core.tasks.filler import TextFiller
    from cortex_core.training.life import Life, new_sleeper

    def encode(text: str) -> list[int]:
        return demo.tokenizer(text, add_special_tokens=False).input_ids

    sleeper = new_sleeper(
        copy.deepcopy(demo.model), encode, demo.corpus, sleep or SleepConfig(), replay or ReplayConfig(),
        DreamConfig(scenario=scenario or ScenarioConfig()),
    )  # fmt: skip
    return Life(sleeper, config, demo.vocabulary, TextFiller(demo.corpus, "held_out"))


def known(life: Life) -> list[float]:
    """Of each fact, the share of the places in which the model knows it."""
    return [sum(places) / len(places) for places in zip(*life.known(), strict=True)]
