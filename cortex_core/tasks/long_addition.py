"""Long addition: " add b 1 a 2 plus b 3 a 9;" ... " sum" must be answered " a 1 b 5 c 0", 51 from the units up.

The letters are index hints (Zhou et al. 2023, "What Algorithms can Transformers Learn?"): they name the place value of
the digit that follows, a being the units. With them the two digits to add stand after a letter that the reader has just
written itself, and the carry is what it wrote before. In the plain form the reader has to find its place by counting.

Split addition has the gap between the numbers: " add b 1 a 2" ... " plus b 3 a 9; sum a 1 b 5 c 0;". One digit of every
pair has to be remembered, the other stands in the window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cortex_core.errors import ConfigError
from cortex_core.tasks.digits import DigitTask
from cortex_core.tasks.layout import Part, Sheet
from cortex_core.tasks.vocabulary import HINTS


@dataclass(frozen=True)
class LongAddition(DigitTask):
    """Two numbers of `num_digits` digits; asked is their sum, `num_digits` + 1 digits from the units up.

    It is asked once whatever `num_queries` says: a second question could be answered from the first.
    """

    name: ClassVar[str] = "long_addition"

    num_digits: int = 32
    index_hints: bool = True
    """Whether letters name the places; False is the plain form, " add 1 2 plus 3 9;" and " sum 1 5 0;"."""

    def __post_init__(self) -> None:
        """Raises ConfigError when the sum has more digits than there are hints."""
        if self.index_hints and not 1 <= self.num_digits < len(HINTS):
            raise ConfigError(f"num_digits = {self.num_digits} must lie in 1 to {len(HINTS) - 1} with index hints")

    def chance(self) -> float:
        """Every digit has to be guessed, the leading one out of 0 and 1."""
        return 0.1**self.num_digits / 2

    def sheet(self, index: int, num_queries: int) -> Sheet:
        first, second, total = self._parts(index)
        told = Part([*first.tokens, *second.tokens])
        return Sheet([told], [total])

    def _parts(self, index: int) -> tuple[Part, Part, Part]:
        """Both numbers, and the question with its answer."""
        pieces = self.vocabulary.pieces
        first, second = self.rng(index).integers(0, 10, (2, self.num_digits))
        units_last = range(self.num_digits - 1, -1, -1)
        answer = self._number(range(self.num_digits + 1), np.array(_sum_from_units(first, second)))
        opening = pieces[" sum"]
        return (
            Part([*pieces[" add"], *self._number(units_last, first)]),
            Part([*pieces[" plus"], *self._number(units_last, second), *pieces[";"]]),
            Part([*opening, *answer, *pieces[";"]], len(opening), len(opening) + len(answer)),
        )

    def _number(self, places: range, digits: np.ndarray) -> list[int]:
        return self.vocabulary.hinted(places, digits) if self.index_hints else self.vocabulary.digits(digits)


@dataclass(frozen=True)
class SplitAddition(LongAddition):
    """The same with the gap between the numbers: the second is part of the question."""

    name: ClassVar[str] = "split_addition"

    def sheet(self, index: int, num_queries: int) -> Sheet:
        first, second, total = self._parts(index)
        before = len(second.tokens)
        asked = Part([*second.tokens, *total.tokens], before + total.answer_from, before + total.answer_to)
        return Sheet([first], [asked])


def _sum_from_units(first: np.ndarray, second: np.ndarray) -> list[int]:
    """Digits of the sum, least significant first, with a leading 0 where nothing is carried."""
    digits, carry = [], 0
    for a, b in zip(first[::-1], second[::-1], strict=True):
        carry, digit = divmod(int(a) + int(b) + carry, 10)
        digits.append(digit)
    return [*digits, carry]
