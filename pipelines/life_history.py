"""What is known of a life of facts, day after day and in the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

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


class _Waiting(NamedTuple):
    """A day of which not all is known yet."""

    number: int
    nights: list[dict[str, float]]
    """Metrics of each."""
    until: int
    """So many nights must be over."""


class History:
    """What is known of each day's facts after each night."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self.before: list[list[bool]] = []
        """Of each lead, of each fact, before the first day."""
        self.days: list[dict[str, float]] = []
        self.known: list[list[float]] = []
        """After each day and night, the share of the facts of this and every earlier day."""
        self._waiting: list[_Waiting] = []

    def add(self, day: Day, until: int = 0) -> None:
        """After a day, of which all is known when as many nights as `until` are over."""
        self._waiting.append(_Waiting(day.number, [night.metrics for night in day.nights], until))

    def catch_up(self, over: int = 0) -> None:
        """Ask what is known after the days for which as many nights as are `over` are enough. All workers together."""
        while self._waiting and self._waiting[0].until <= over:
            self._ask(self._waiting.pop(0))

    def _ask(self, day: _Waiting) -> None:
        life, number, nights = self._life, day.number, day.nights
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
            waiting = parts.get("waiting", [])  # older files have none
            self._waiting = [_Waiting(int(n), list(nights), int(until)) for n, nights, until in waiting]
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
