"""A life of facts: told day by day, slept on, and asked with empty fast weights at any time after."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool

from cortex_core.backbone.model import Cortex
from cortex_core.backbone.prompts import Prompts, answers
from cortex_core.config import DreamConfig, FisherConfig, LifeConfig, ReplayConfig, ScalingConfig, SleepConfig
from cortex_core.consolidation.guard import DriftGuard
from cortex_core.consolidation.night_codes import NightCodes
from cortex_core.consolidation.sleeper import Encode, Sleeper, Slept
from cortex_core.errors import ConfigError
from cortex_core.tasks.corpus import Corpus
from cortex_core.tasks.fact_book import FactBook
from cortex_core.tasks.filler import Filler, TextFiller
from cortex_core.tasks.vocabulary import TaskVocabulary
from cortex_core.training.dreams import Dreams

ASKED_AT_ONCE, GUARD_TOKENS, MIXED_WINDOWS = 128, 256, 64
_LEAD_STREAM, _GUARD_STREAM, _MIXED_STREAM = 31, 37, 41


class Day(NamedTuple):
    """What a day was like, and its night."""

    number: int
    nights: list[Slept]


class Life:
    """A reader that is told a book of facts. One day has `sleep.every_tokens` tokens."""

    def __init__(self, sleeper: Sleeper, config: LifeConfig, vocabulary: TaskVocabulary, filler: Filler) -> None:
        """`filler`: text that the facts stand in, held out. Raises ConfigError if the facts of a day do not fit it."""
        self.sleeper, self.config = sleeper, config
        self.book = FactBook(vocabulary, filler, config.num_facts, config.seed)
        self._filler = filler
        width = sleeper.model.segment_tokens
        if self._tokens % width:
            raise ConfigError(
                f"sleep.every_tokens = {self._tokens}: a day that facts are told in must be a multiple of {width}, the "
                f"segment that attention sees. Set it to {-(-self._tokens // width) * width}"
            )
        self.book.day(0, self.told_on(0), self._tokens)

    @property
    def num_days(self) -> int:
        """Days on which facts are told."""
        return -(-self.config.num_facts // self.config.facts_per_day)

    @property
    def day(self) -> int:
        """The day that has begun, from 0: where `live` goes on."""
        return self.sleeper.num_tokens // self._tokens

    def told_on(self, day: int) -> range:
        """Numbers of the facts that are told on a day."""
        first = day * self.config.facts_per_day
        return range(min(first, self.config.num_facts), min(first + self.config.facts_per_day, self.config.num_facts))

    @property
    def num_tokens(self) -> int:
        """Tokens of all days, and one: the night after a day comes with the first token of the next, which is read with
        it, so that the last day is followed by a token that tells nothing."""
        return self.num_days * self._tokens + 1

    def live(self) -> Iterator[Day]:
        """Read each day that is left."""
        for number in range(self.day, self.num_days):
            yield Day(number, self.read_until((number + 1) * self._tokens + 1))

    def read_until(self, position: int) -> list[Slept]:
        """Read on until so many tokens have been read in all. Returns the nights on the way."""
        begun = self.sleeper.num_tokens
        days = range(begun // self._tokens, -(-position // self._tokens))
        told = [token for day in days for token in self.book.day(day, self.told_on(day), self._tokens)]
        first = days.start * self._tokens
        return self.sleeper.read(told[begun - first : position - first])

    @torch.no_grad()
    def recalled(self, facts: Sequence[int], lead_tokens: int = 0) -> Bool[torch.Tensor, " facts"]:
        """Of which of these facts the model says the value, its fast weights empty; asked after so much other text."""
        asked = [self.book.facts[number] for number in facts]
        rows = [[*self._lead(n, lead_tokens), *self.book.question(f)] for n, f in zip(facts, asked, strict=True)]
        model = self.sleeper.model
        found = [answers(model, part).argmax(-1).cpu() for part in Prompts.of(rows).split(ASKED_AT_ONCE)]
        return torch.cat(found) == torch.tensor([fact.value for fact in asked])

    def known(self) -> list[list[bool]]:
        """`recalled` of all facts, for each of `lead_tokens`."""
        return [self.recalled(range(self.config.num_facts), lead).tolist() for lead in self.config.lead_tokens]

    @property
    def _tokens(self) -> int:
        return self.sleeper.config.every_tokens

    def _lead(self, number: int, tokens: int) -> list[int]:
        return self._filler.tokens((self.config.seed, number, _LEAD_STREAM), tokens).tolist() if tokens else []


def new_sleeper(
    model: Cortex, encode: Encode, corpus: Corpus, sleep: SleepConfig, replay: ReplayConfig,
    dream: DreamConfig | None = None, after_backward: Callable[[], None] = lambda: None,
    *, fisher: FisherConfig | None = None, scaling: ScalingConfig | None = None,
    codes: NightCodes | None = None, kind: Callable[..., Sleeper] = Sleeper, dreams: Callable[..., Dreams] = Dreams,
) -> Sleeper:  # fmt: skip
    """A reader of `model` whose nights are guarded on held-out text; `encode` and `after_backward` as of `Sleeper`. It
    remembers what was written, to dream of it as `dream` says; that is learned if `sleep.dream_frac` asks for it.
    `kind` and `dreams` make it and its dreams, where these are others than `Sleeper` and `Dreams`.

    Raises ConfigError for a memory that cannot sleep, DataError if there is too little text.
    """
    filler = TextFiller(corpus, "held_out")
    tokens = min(GUARD_TOKENS, model.segment_tokens)
    windows = [filler.tokens((number, _GUARD_STREAM), tokens) for number in range(sleep.guard_windows)]
    guard = DriftGuard(torch.tensor(np.stack(windows)), sleep.max_drift_nats) if windows else None
    remembered = dreams(model, dream or DreamConfig(), sleep, encode(sleep.questions[0]))
    text = mixed_text(model, corpus) if sleep.mixed_text_weight else None
    return kind(
        model, sleep, replay, encode=encode, guard=guard, dreams=remembered, mixed_text=text,
        fisher=fisher, scaling=scaling, codes=codes, after_backward=after_backward,
    )  # fmt: skip


def mixed_text(model: Cortex, corpus: Corpus) -> torch.Tensor:
    """Windows of text for training, of which nights may mix some in."""
    filler, tokens = TextFiller(corpus, "train"), min(GUARD_TOKENS, model.segment_tokens)
    return torch.tensor(np.stack([filler.tokens((n, _MIXED_STREAM), tokens) for n in range(MIXED_WINDOWS)]))
