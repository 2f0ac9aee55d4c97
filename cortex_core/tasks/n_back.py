"""N back: " items c river b stone a lamp;" ... " item b" must be answered " stone", the second from the end.

The letters are index hints (Zhou et al. 2023, "What Algorithms can Transformers Learn?"): they count down to the end.
In the plain form, " items river stone lamp;" and " item 2", the reader counts itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cortex_core.errors import ConfigError
from cortex_core.tasks.layout import Part, Sheet, TextTask, rounds
from cortex_core.tasks.vocabulary import HINTS


@dataclass(frozen=True)
class NBack(TextTask):
    """One list of `num_items` distinct words; questions count back from its end, a or 1 being the last item."""

    name: ClassVar[str] = "n_back"

    num_items: int = 8
    index_hints: bool = True
    """Whether letters name the positions; False is the plain form."""

    def __post_init__(self) -> None:
        """Raises ConfigError beyond one digit or the hints, or beyond the words in the pool."""
        bound = min(len(HINTS) if self.index_hints else 9, len(self.vocabulary.values[self.split]))
        if not 1 <= self.num_items <= bound:
            raise ConfigError(f"num_items = {self.num_items} must lie in 1 to {bound}")

    def sheet(self, index: int, num_queries: int) -> Sheet:
        pieces, rng = self.vocabulary.pieces, self.rng(index)
        words = rng.choice(self.pools(index)[1], self.num_items, replace=False).tolist()
        last_first = [(self._position(back), word) for back, word in enumerate(reversed(words))]
        told = [
            token
            for position, word in reversed(last_first)
            for token in ((*position, word) if self.index_hints else (word,))
        ]
        queries = []
        for back in rounds(rng, self.num_items, num_queries):
            position, word = last_first[back]
            opening = [*pieces[" item"], *position]
            queries.append(Part([*opening, word, *pieces[";"]], len(opening), len(opening) + 1))
        return Sheet([Part([*pieces[" items"], *told, *pieces[";"]])], queries)

    def _position(self, back: int) -> tuple[int, ...]:
        """Ids of the name of the item that `back` items follow."""
        return self.vocabulary.pieces[HINTS[back]] if self.index_hints else tuple(self.vocabulary.digits([back + 1]))
