"""Needles in a haystack, as in RULER: " remember river stone;" somewhere in the gap, " recall river" after it.

Hsieh et al. 2024, "RULER: What's the Real Context Size of Your Long-Context Language Models?"
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cortex_core.errors import ConfigError
from cortex_core.tasks.layout import Sheet, TextTask


@dataclass(frozen=True)
class Needle(TextTask):
    """`num_keys` keys with `num_values` values each, one fact per value; `num_asked` keys are asked.

    A key is answered with all its values in the order in which they were told: " recall river" -> " stone lamp". An
    example is right when every answer in it is. More questions than `num_asked` ask for more keys, each one once.
    """

    name: ClassVar[str] = "needle_single"
    scattered: ClassVar[bool] = True

    num_keys: int = 1
    num_values: int = 1
    num_asked: int = 1

    def __post_init__(self) -> None:
        """Raises ConfigError when a number is below 1, more keys are asked than told, or words are too few."""
        for name in ("num_keys", "num_values", "num_asked"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.num_asked > self.num_keys:
            raise ConfigError(f"num_asked = {self.num_asked} must be at most num_keys = {self.num_keys}")
        self.check_words(self.num_keys, self.num_keys * self.num_values)

    def chance(self) -> float:
        """Every value that is asked for has to be guessed."""
        return super().chance() ** (self.num_asked * self.num_values)

    def sheet(self, index: int, num_queries: int) -> Sheet:
        rng = self.rng(index)
        keys, drawn = self.words(index, rng, self.num_keys, self.num_keys * self.num_values)
        values = iter(drawn)
        told: dict[int, list[int]] = {key: [] for key in keys}
        facts = []
        for key in rng.permutation(np.repeat(keys, self.num_values)).tolist():
            value = next(values)
            told[key].append(value)
            facts.append(self.line(" remember", (key, value)))
        asked = rng.permutation(keys).tolist()[: max(self.num_asked, num_queries)]
        return Sheet(facts, [self.line(" recall", (key, *told[key]), num_answers=self.num_values) for key in asked])


@dataclass(frozen=True)
class MultiKeyNeedle(Needle):
    """Eight keys, of which one is asked: the others are there to be mistaken for it."""

    name: ClassVar[str] = "needle_multi_key"

    num_keys: int = 8


@dataclass(frozen=True)
class MultiValueNeedle(Needle):
    """One key with four values, told one at a time; all of them are asked at once."""

    name: ClassVar[str] = "needle_multi_value"

    num_values: int = 4


@dataclass(frozen=True)
class MultiQueryNeedle(Needle):
    """Eight keys, of which four are asked one after the other."""

    name: ClassVar[str] = "needle_multi_query"

    num_keys: int = 8
    num_asked: int = 4
