"""Copy in reverse: " digits a 4 b 0 c 7;" ... " reverse" must be answered " c 7 b 0 a 4".

The letters are index hints (Zhou et al. 2023, "What Algorithms can Transformers Learn?"): they name the position of
the digit that follows. Without them a reader has to count, which small models do not learn beyond the lengths that
they are trained on; with them the next digit stands after a letter that the reader has just written itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cortex_core.errors import ConfigError
from cortex_core.tasks.digits import DigitTask
from cortex_core.tasks.layout import Part, Sheet
from cortex_core.tasks.vocabulary import HINTS


@dataclass(frozen=True)
class CopyReverse(DigitTask):
    """One string of `num_digits` random digits; the question asks for all of it, last digit first.

    It is asked once whatever `num_queries` says: a second question could be answered from the first.
    """

    name: ClassVar[str] = "copy_reverse"

    index_hints: bool = True
    """Whether letters name the positions; False is the plain form, " digits 4 0 7;" and " reverse 7 0 4;"."""

    def __post_init__(self) -> None:
        """Raises ConfigError for more digits than there are hints."""
        if self.index_hints and not 1 <= self.num_digits <= len(HINTS):
            raise ConfigError(f"num_digits = {self.num_digits} must lie in 1 to {len(HINTS)} with index hints")

    def chance(self) -> float:
        """The hints can be known; every digit has to be guessed."""
        return 0.1**self.num_digits

    def sheet(self, index: int, num_queries: int) -> Sheet:
        pieces = self.vocabulary.pieces
        numbers = self.rng(index).integers(0, 10, self.num_digits)
        order = range(self.num_digits)
        if self.index_hints:
            told = self.vocabulary.hinted(order, numbers)
            answer = self.vocabulary.hinted(reversed(order), numbers[::-1])
        else:
            told, answer = self.vocabulary.digits(numbers), self.vocabulary.digits(numbers[::-1])
        opening = pieces[" reverse"]
        query = Part([*opening, *answer, *pieces[";"]], len(opening), len(opening) + len(answer))
        return Sheet([Part([*pieces[" digits"], *told, *pieces[";"]])], [query])
