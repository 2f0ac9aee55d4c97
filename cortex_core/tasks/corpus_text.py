"""Plain text as a task: nothing is asked, the language model's own loss is the objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cortex_core.tasks.layout import Sheet, TextTask
from cortex_core.tasks.vocabulary import IntArray


@dataclass(frozen=True)
class CorpusText(TextTask):
    """Excerpts from random places; `gap_tokens` is the length of the excerpt and no token is an answer."""

    name: ClassVar[str] = "corpus"

    def sheet(self, index: int, num_queries: int) -> Sheet:
        return Sheet([], [])

    def _prefix(self) -> IntArray:
        """Nothing: an excerpt starts in the middle of a document."""
        return np.zeros(0, np.int64)
