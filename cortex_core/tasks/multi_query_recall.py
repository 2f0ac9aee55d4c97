"""Multi-query associative recall: " pairs river stone lamp wood;" ... " pair river" must be answered " stone".

The synthetic task of Arora et al. 2023 ("Zoology: Measuring and Improving Recall in Efficient Language Models") through
any tokenizer: keys and values in turn, nothing between them. Its original, in bare token ids, is
`cortex_core.tasks.mqar`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cortex_core.errors import ConfigError
from cortex_core.tasks.layout import Sheet, TextTask, rounds


@dataclass(frozen=True)
class MultiQueryRecall(TextTask):
    """`num_pairs` pairs of distinct words in one line. Every key is asked once, then again."""

    name: ClassVar[str] = "multi_query_recall"

    num_pairs: int = 6

    def __post_init__(self) -> None:
        """Raises ConfigError without pairs, or when a pool has fewer words than `num_pairs`."""
        if self.num_pairs < 1:
            raise ConfigError(f"num_pairs = {self.num_pairs} must be at least 1")
        self.check_words(self.num_pairs, self.num_pairs)

    def sheet(self, index: int, num_queries: int) -> Sheet:
        rng = self.rng(index)
        pairs = list(zip(*self.words(index, rng, self.num_pairs, self.num_pairs), strict=True))
        return Sheet(
            facts=[self.line(" pairs", [word for pair in pairs for word in pair])],
            queries=[self.line(" pair", pairs[i], num_answers=1) for i in rounds(rng, self.num_pairs, num_queries)],
        )
