"""A life of facts that stay true: told day by day, among other text, and asked for at any time after.

The tasks of training draw new facts for every example, so that nothing can be learned but the skill of remembering.
Here every key has one value for good; that is what sleep may move into slow weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from cortex_core.errors import ConfigError
from cortex_core.tasks.filler import Filler
from cortex_core.tasks.vocabulary import IntArray, TaskVocabulary

_STREAM = 17  # keeps the filler of days apart from other draws


class Fact(NamedTuple):
    """Token ids."""

    key: int
    value: int


@dataclass(frozen=True)
class FactBook:
    """`num_facts` pairs of tokens: " remember river stone;" is told, " recall river" is asked.

    Keys are any tokens, each once; values are held-out words. Which belongs to which depends on the seed alone.
    """

    vocabulary: TaskVocabulary
    filler: Filler
    num_facts: int
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ConfigError when there are fewer keys than facts."""
        if not 1 <= self.num_facts <= len(self._keys):
            raise ConfigError(
                f"num_facts = {self.num_facts} must lie in 1 to {len(self._keys)}: each needs a token of its own for a "
                "key, and this tokenizer has no more"
            )

    @property
    def _keys(self) -> IntArray:
        return np.setdiff1d(self.vocabulary.random_ids, self.vocabulary.values["held_out"])

    @cached_property
    def facts(self) -> tuple[Fact, ...]:
        """All facts, in the order in which they are told."""
        rng = np.random.default_rng([self.seed, _STREAM])
        keys = rng.choice(self._keys, self.num_facts, replace=False)
        values = rng.choice(self.vocabulary.values["held_out"], self.num_facts)
        return tuple(Fact(int(key), int(value)) for key, value in zip(keys, values, strict=True))

    def told(self, fact: Fact) -> list[int]:
        """The line that tells a fact."""
        pieces = self.vocabulary.pieces
        return [*pieces[" remember"], *fact, *pieces[";"]]

    def question(self, fact: Fact) -> list[int]:
        """What is asked; the value should come next."""
        return [*self.vocabulary.pieces[" recall"], fact.key]

    def day(self, number: int, facts: range, tokens: int) -> list[int]:
        """`tokens` of text in which these facts stand, spread evenly. Raises ConfigError if they do not fit."""
        lines = [self.told(self.facts[at]) for at in facts]
        room = tokens - sum(map(len, lines))
        if room < 0:
            raise ConfigError(
                f"{len(lines)} facts take {tokens - room} tokens, a day has {tokens}: tell fewer, or longer days"
            )
        text = self.filler.tokens((self.seed, number, _STREAM), room)
        parts = np.array_split(text, len(lines) + 1)
        spread = [int(token) for part, line in zip(parts, [*lines, []], strict=True) for token in (*part, *line)]
        return spread
