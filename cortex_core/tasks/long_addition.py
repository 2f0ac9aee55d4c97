"""Long addition: " add 1 2 plus 3 9;" ... " sum" must be answered " 1 5 0", 51 from the units up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cortex_core.tasks.layout import Part, Sheet, TextTask


@dataclass(frozen=True)
class LongAddition(TextTask):
    """Two numbers of `num_digits` digits; asked is their sum, `num_digits` + 1 digits from the units up.

    It is asked once whatever `num_queries` says: a second question could be answered from the first.
    """

    name: ClassVar[str] = "long_addition"

    num_digits: int = 32

    def sheet(self, index: int, num_queries: int) -> Sheet:
        pieces, digits = self.vocabulary.pieces, self.vocabulary.digits
        first, second = self.rng(index).integers(0, 10, (2, self.num_digits))
        fact = [*pieces[" add"], *digits(first), *pieces[" plus"], *digits(second), *pieces[";"]]
        answer = digits(_sum_from_units(first, second))
        opening = pieces[" sum"]
        query = Part([*opening, *answer, *pieces[";"]], len(opening), len(opening) + len(answer))
        return Sheet([Part(fact)], [query])


def _sum_from_units(first: np.ndarray, second: np.ndarray) -> list[int]:
    """Digits of the sum, least significant first, with a leading 0 where nothing is carried."""
    digits, carry = [], 0
    for a, b in zip(first[::-1], second[::-1], strict=True):
        carry, digit = divmod(int(a) + int(b) + carry, 10)
        digits.append(digit)
    return [*digits, carry]
