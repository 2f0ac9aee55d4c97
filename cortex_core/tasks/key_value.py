"""Key-value recall: " remember river stone;" ... " recall river" must be answered " stone"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cortex_core.errors import ConfigError
from cortex_core.tasks.layout import Part, Sheet, TextTask


@dataclass(frozen=True)
class KeyValue(TextTask):
    """`num_pairs` facts; keys are distinct, values may repeat. Questions ask every key once before any key again."""

    name: ClassVar[str] = "key_value"

    num_pairs: int = 6

    def __post_init__(self) -> None:
        """Raises ConfigError when the pool has fewer keys than `num_pairs`."""
        keys = len(self.vocabulary.keys[self.split])
        if not 1 <= self.num_pairs <= keys:
            raise ConfigError(
                f"num_pairs = {self.num_pairs} must lie in 1 to {keys}, the {self.split.replace('_', '-')} keys that this "
                "tokenizer offers"
            )

    def sheet(self, index: int, num_queries: int) -> Sheet:
        rng = self.rng(index)
        keys = rng.choice(self.vocabulary.keys[self.split], self.num_pairs, replace=False)
        values = rng.choice(self.vocabulary.values[self.split], self.num_pairs)
        rounds = -(-num_queries // self.num_pairs)
        asked = [pair for _ in range(rounds) for pair in rng.permutation(self.num_pairs)][:num_queries]
        return Sheet(
            facts=[self._line(" remember", keys[pair], values[pair], asks=False) for pair in range(self.num_pairs)],
            queries=[self._line(" recall", keys[pair], values[pair], asks=True) for pair in asked],
        )

    def _line(self, marker: str, key: int, value: int, *, asks: bool) -> Part:
        opening = [*self.vocabulary.pieces[marker], int(key)]
        tokens = [*opening, int(value), *self.vocabulary.pieces[";"]]
        return Part(tokens, len(opening), len(opening) + 1) if asks else Part(tokens)
