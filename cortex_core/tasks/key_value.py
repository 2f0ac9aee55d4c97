"""Key-value recall: " remember river stone;" ... " recall river" must be answered " stone"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cortex_core.errors import ConfigError
from cortex_core.tasks.layout import Sheet, TextTask, rounds


@dataclass(frozen=True)
class KeyValue(TextTask):
    """`num_pairs` facts with distinct keys; values may repeat. Every key is asked once, then again."""

    name: ClassVar[str] = "key_value"

    num_pairs: int = 6

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
        key_pool, value_pool = self.pools(index)
        keys = rng.choice(key_pool, self.num_pairs, replace=False).tolist()
        values = rng.choice(value_pool, self.num_pairs).tolist()
        pairs = list(zip(keys, values, strict=True))
        return Sheet(
            facts=[self.line(" remember", pair) for pair in pairs],
            queries=[self.line(" recall", pairs[i], num_answers=1) for i in rounds(rng, self.num_pairs, num_queries)],
        )
