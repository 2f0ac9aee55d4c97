"""Plain text as a task: nothing is asked within a window; over several, to predict on from what was read before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cortex_core.tasks.layout import SPLIT_CODES, Example, Sheet, TextTask
from cortex_core.tasks.vocabulary import IntArray


@dataclass(frozen=True)
class CorpusText(TextTask):
    """Excerpts from random places; `gap_tokens` is the length of the excerpt.

    No token is an answer, but in a sequence of several segments all that follow the first one.
    """

    name: ClassVar[str] = "corpus"

    def sheet(self, index: int, num_queries: int) -> Sheet:
        return Sheet([], [])

    def spanning_example(
        self, index: int, total_tokens: int, *, num_queries: int = 1, segment_tokens: int = 1
    ) -> Example:
        """Exactly `total_tokens` of text; to be predicted is what follows the first token of the second segment."""
        tokens = self.filler.tokens((self.seed, SPLIT_CODES[self.split], index), total_tokens)
        return Example(tokens, np.arange(total_tokens) > segment_tokens)

    def _prefix(self) -> IntArray:
        """Nothing: an excerpt starts in the middle of a document."""
        return np.zeros(0, np.int64)
