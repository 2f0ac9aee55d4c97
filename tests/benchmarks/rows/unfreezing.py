"""Rows about guarded unfreezing: what low-rank changes of the backbone know, what text pays, and that they can go."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Set
from typing import TYPE_CHECKING

from cortex_core.config import DreamConfig, LifeConfig, ReplayConfig, SleepConfig, UnfreezeConfig
from tests.benchmarks.row import Row
from tests.benchmarks.rows.demo import Demo

if TYPE_CHECKING:
    from torch import Tensor

    from cortex_core.backbone.model import Cortex

SEEDS, FACTS = (0, 1, 2), 16
TEXT_ROWS, TEXT_TOKENS = 64, 1024
KNOWN, BEHIND, PERPLEXITY, ROLLBACKS, CHANGED = ROWS = (
    "unfreezing_facts_known",
    "unfreezing_facts_known_behind_text",
    "unfreezing_text_perplexity_percent",
    "unfreezing_rollbacks",
    "unfreezing_logits_changed_after_removal",
)
PERPLEXITY_GOAL_PERCENT = 0.5
SETTINGS = UnfreezeConfig()


def facts_in_the_backbone(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Of 16 facts told in 2 days, the share that is known by low-rank changes of the backbone, with empty fast weights.

    Three lives from the demo's memory under the settings' defaults, `sleep.place = "backbone"`. Asked at once, and behind
    40 tokens of other held-out text: Wilson intervals over all facts. Perplexity of 64 x 1,024 tokens of held-out text
    over the bare model's, in percent, with a 95 % interval over rows and lives. Rollbacks: the share of tried steps that
    had left the trust region. Changed: how many logits of 1,024 tokens differ by a bit, before the first day and after
    the deltas were removed.
    """
    import torch

    from cortex_core.eval.perplexity import text_loss
    from cortex_core.intervals import mean_interval, wilson
    from cortex_core.tasks.filler import TextFiller
    from cortex_core.training.life import Life
    from cortex_core.training.unfreezing import new_unfreezer

    def encode(text: str) -> list[int]:
        return demo.tokenizer(text, add_special_tokens=False).input_ids

    text = torch.as_tensor(demo.excerpts(TEXT_ROWS, TEXT_TOKENS))
    known: dict[str, list[bool]] = {KNOWN: [], BEHIND: []}
    differences, steps, rollbacks, changed, logits = list[float](), 0.0, 0, 0, 0
    for seed in SEEDS:
        model = copy.deepcopy(demo.model)
        before = _logits(model, text[:1])
        sleeper = new_unfreezer(
            model, encode, demo.corpus, demo.vocabulary, SleepConfig(place="backbone"), ReplayConfig(),
            SETTINGS, DreamConfig(),
        )  # fmt: skip
        life = Life(
            sleeper, LifeConfig(num_facts=FACTS, seed=seed), demo.vocabulary, TextFiller(demo.corpus, "held_out")
        )
        steps += sum(night.metrics.get("unfreeze/steps", 0.0) for day in life.live() for night in day.nights)
        rollbacks += sleeper.num_rollbacks
        for name, lead in ((KNOWN, 0), (BEHIND, 40)):
            known[name] += life.recalled(range(FACTS), lead).tolist()
        losses = text_loss(model, text)
        differences += (losses.with_memory - losses.bare).tolist()
        if sleeper.deltas is not None:
            sleeper.deltas.remove()
        changed, logits = changed + int((_logits(model, text[:1]) != before).sum()), logits + before.numel()
    for name, right in known.items():
        low, high, value = wilson(sum(right), len(right))
        yield Row(name, value, None, "higher", "", len(right), low, high)
    low, high, value = (100 * math.expm1(x) for x in mean_interval(differences))
    yield Row(PERPLEXITY, value, PERPLEXITY_GOAL_PERCENT, "lower", "%", len(differences), low, high)
    tries = round(steps) + rollbacks
    low, high, value = wilson(rollbacks, tries)
    yield Row(ROLLBACKS, value, None, "lower", "", tries, low, high)
    yield Row(CHANGED, float(changed), 0.0, "lower", "logits", logits)


def _logits(model: Cortex, tokens: Tensor) -> Tensor:
    import torch

    with torch.no_grad():
        found = model(input_ids=tokens).logits
    assert found is not None
    return found
