"""Facts with keys of two words: " remember river depth stone;" ... " recall river depth" must be answered " stone".

What a session tells over a day, and sleep has to keep: a few words give thousands of facts, and each word of a key
stands in the keys of other facts as well, so that neither word is the address of a fact by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from cortex_core.errors import ConfigError
from cortex_core.tasks.layout import Part, Sheet, TextTask, rounds


class Fact(NamedTuple):
    """Token ids of one fact."""

    key: tuple[int, int]
    value: int


@dataclass(frozen=True)
class SessionFacts(TextTask):
    """`num_pairs` facts with distinct keys; values may repeat. Every key is asked once, then again."""

    name: ClassVar[str] = "session_facts"

    num_pairs: int = 6

    def __post_init__(self) -> None:
        """Raises ConfigError when the pool has too few words for `num_pairs` keys."""
        most = len(self.vocabulary.keys[self.split]) ** 2
        if not 1 <= self.num_pairs <= most:
            raise ConfigError(
                f"num_pairs = {self.num_pairs} must lie in 1 to {most}: so many keys of two words can be made of what "
                f"this tokenizer offers as {self.split.replace('_', '-')} keys"
            )

    def facts(self, index: int) -> list[Fact]:
        """The facts of example `index`. Keys are drawn from a square of words that they fill to a half."""
        rng = self.rng(index)
        key_pool, value_pool = self.pools(index)
        side = min(math.ceil(math.sqrt(2 * self.num_pairs)), len(key_pool))
        first, second = (rng.choice(key_pool, side, replace=False) for _ in range(2))
        cells = rng.choice(side * side, self.num_pairs, replace=False)
        values = rng.choice(value_pool, self.num_pairs)
        return [
            Fact((int(first[cell // side]), int(second[cell % side])), int(value))
            for cell, value in zip(cells, values, strict=True)
        ]

    def told(self, fact: Fact) -> Part:
        """The line that tells a fact."""
        return self.line(" remember", [*fact.key, fact.value])

    def asked(self, fact: Fact) -> Part:
        """The line that asks for it, with the answer."""
        return self.line(" recall", [*fact.key, fact.value], num_answers=1)

    def sheet(self, index: int, num_queries: int) -> Sheet:
        facts = self.facts(index)
        order = rounds(self.rng(index, 9), self.num_pairs, num_queries)
        return Sheet([self.told(fact) for fact in facts], [self.asked(facts[i]) for i in order])
