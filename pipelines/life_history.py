"""What is known of a life of facts, day after day and in the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cortex_core.backbone.model import Cortex
from cortex_core.errors import DataError
from cortex_core.eval.perplexity import drift, text_loss
from cortex_core.intervals import wilson
from cortex_core.tasks.corpus import Corpus
from cortex_core.training.life import Day, Life

HISTORY = "history.json"
TEXT_TOKENS, TEXT_SEED = 1024, 53


class History:
    """What is known of each day's facts after each night."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self.before: list[list[bool]] = []
        """Of each lead, of each fact, before the first day."""
        self.days: list[dict[str, float]] = []
        self.known: list[list[float]] = []
        """After each day and night, the share of the facts of this and every earlier day."""
        self._waiting: list[tuple[int, list[dict[str, float]]]] = []
        """Days, with metrics of their nights, of which not all is known yet."""

    def add(self, day: Day, num_away: int = 0) -> None:
        """After a day, whose night may still be slept elsewhere, as one of `num_away`."""
        self._waiting.append((day.number, [night.metrics for night in day.nights]))
        self.catch_up(num_away)

    def catch_up(self, num_away: int) -> None:
        """Ask what is known after the days whose nights are over: all but the last `num_away`. All workers together."""
        while len(self._waiting) > num_away:
            self._ask(*self._waiting.pop(0))

    def _ask(self, number: int, nights: list[dict[str, float]]) -> None:
        life = self._life
        told = range(life.told_on(number).stop)
        right = life.recalled(told, life.config.lead_tokens[0]).double()
        self.known.append([float(right[[*life.told_on(n)]].mean()) for n in range(number + 1)])
        names = dict.fromkeys(name for night in nights for name in night)  # none, if the day had no night
        means = {name: sum(night.get(name, 0.0) for night in nights) / len(nights) for name in names}
        self.days.append(means | {"sleep/known_frac": float(right.mean())})

    def metrics(self) -> dict[str, float]:
        """Of the last day."""
        return self.days[-1]

    def save(self, folder: Path) -> None:
        """One JSON file."""
        parts = {"before": self.before, "days": self.days, "known": self.known, "waiting": self._waiting}
        (folder / HISTORY).write_text(json.dumps(parts))

    def load(self, folder: Path) -> None:
        """Go on from `save`. Raises DataError."""
        try:
            parts = json.loads((folder / HISTORY).read_text())
            self.before, self.days, self.known = parts["before"], parts["days"], parts["known"]
            self._waiting = [(int(number), list(nights)) for number, nights in parts.get("waiting", [])]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder / HISTORY}: not readable ({error}); it is damaged") from error


def document_of(life: Life, history: History, model: Cortex, corpus: Corpus, tokens: int) -> dict[str, Any]:
    """What is known now, and what text costs; for the report."""
    rows = []
    for when, found in (("before", history.before), ("after", life.known())):
        for lead, right in zip(life.config.lead_tokens, found, strict=True):
            low, high, share = wilson(sum(right), len(right))
            rows.append({"when": when, "lead_tokens": lead, "known": share, "low": low, "high": high, "n": len(right)})
    count = max(2, tokens // TEXT_TOKENS)
    excerpts = [corpus.excerpt((TEXT_SEED, row), TEXT_TOKENS, "held_out") for row in range(count)]
    text, bytes_per_token = torch.tensor(np.stack(excerpts)), corpus.held_out_bytes / len(corpus.held_out)
    return {
        "rows": rows,
        "days": history.days,
        "known_by_day": history.known,
        "nights": life.sleeper.num_nights,
        "nights_undone": life.sleeper.num_undone,
        "place": life.sleeper.config.place,
        "slow_bytes": sum(value.numel() * value.element_size() for value in life.sleeper.values().values()),
        "drift": drift(text_loss(model, text.to(model.backbone.device)), bytes_per_token) | {"rows": count},
    }
