"""Key-value recall: " remember river stone;" ... " recall river" must be answered " stone"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cortex_core.errors import ConfigError
from cortex_core.tasks.layout import Part, Sheet, TextTask
from cortex_core.tasks.vocabulary import IntArray


@dataclass(frozen=True)
class KeyValue(TextTask):
    """`num_pairs` facts with distinct keys; values may repeat. Every key is asked once, then again."""

    name: ClassVar[str] = "key_value"

    num_pairs: int = 6
    any_token_frac: float = 0.0
    """Share of examples whose keys and values may be any token but held-out words: a small vocabulary has
    too few words to learn from them what a key is."""

    def __post_init__(self) -> None:
        """Raises ConfigError when the pool has fewer keys than `num_pairs`."""
        keys = len(self.vocabulary.keys[self.split])
        if not 1 <= self.num_pairs <= keys:
            raise ConfigError(
                f"num_pairs = {self.num_pairs} must lie in 1 to {keys}: this tokenizer offers "
                f"{keys} {self.split.replace('_', '-')} keys"
            )

    def sheet(self, index: int, num_queries: int) -> Sheet:
        rng = self.rng(index)
        key_pool, value_pool = self._pools(index)
        keys = rng.choice(key_pool, self.num_pairs, replace=False).tolist()
        values = rng.choice(value_pool, self.num_pairs).tolist()
        rounds = -(-num_queries // self.num_pairs)
        asked = [pair for _ in range(rounds) for pair in rng.permutation(self.num_pairs)][:num_queries]
        return Sheet(
            facts=[self._line(" remember", keys[pair], values[pair], asks=False) for pair in range(self.num_pairs)],
            queries=[self._line(" recall", keys[pair], values[pair], asks=True) for pair in asked],
        )

    def _pools(self, index: int) -> tuple[IntArray, IntArray]:
        if self.any_token_frac and self.rng(index, 4).random() < self.any_token_frac:
            return self.vocabulary.shared_ids, self.vocabulary.shared_ids
        return self.vocabulary.keys[self.split], self.vocabulary.values[self.split]

    def _line(self, marker: str, key: int, value: int, *, asks: bool) -> Part:
        opening = [*self.vocabulary.pieces[marker], key]
        tokens = [*opening, value, *self.vocabulary.pieces[";"]]
        return Part(tokens, len(opening), len(opening) + 1) if asks else Part(tokens)
