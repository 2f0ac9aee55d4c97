"""Copy in reverse: " digits 4 0 7;" ... " reverse" must be answered " 7 0 4"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cortex_core.tasks.layout import Part, Sheet, TextTask


@dataclass(frozen=True)
class CopyReverse(TextTask):
    """One string of `num_digits` random digits; the question asks for all of it, last digit first.

    It is asked once whatever `num_queries` says: a second question could be answered from the first.
    """

    name: ClassVar[str] = "copy_reverse"

    num_digits: int = 12

    def sheet(self, index: int, num_queries: int) -> Sheet:
        pieces = self.vocabulary.pieces
        numbers = self.rng(index).integers(0, 10, self.num_digits)
        fact = Part([*pieces[" digits"], *self.vocabulary.digits(numbers), *pieces[";"]])
        opening, answer = pieces[" reverse"], self.vocabulary.digits(numbers[::-1])
        query = Part([*opening, *answer, *pieces[";"]], len(opening), len(opening) + len(answer))
        return Sheet([fact], [query])
