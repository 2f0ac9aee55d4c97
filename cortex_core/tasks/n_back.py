"""N back: " items river stone lamp;" ... " item 2" must be answered " stone", the second from the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cortex_core.errors import ConfigError
from cortex_core.tasks.layout import Part, Sheet, TextTask


@dataclass(frozen=True)
class NBack(TextTask):
    """One list of `num_items` distinct words; questions count back from its end, 1 being the last item."""

    name: ClassVar[str] = "n_back"

    num_items: int = 8

    def __post_init__(self) -> None:
        """Raises ConfigError beyond one digit, or beyond the words in the pool."""
        bound = min(9, len(self.vocabulary.values[self.split]))
        if not 1 <= self.num_items <= bound:
            raise ConfigError(f"num_items = {self.num_items} must lie in 1 to {bound}")

    def sheet(self, index: int, num_queries: int) -> Sheet:
        pieces = self.vocabulary.pieces
        rng = self.rng(index)
        words = rng.choice(self.vocabulary.values[self.split], self.num_items, replace=False)
        fact = Part([*pieces[" items"], *map(int, words), *pieces[";"]])
        rounds = -(-num_queries // self.num_items)
        asked = [back for _ in range(rounds) for back in rng.permutation(self.num_items) + 1][:num_queries]
        queries = []
        for back in asked:
            opening = [*pieces[" item"], *self.vocabulary.digits([back])]
            tokens = [*opening, int(words[-back]), *pieces[";"]]
            queries.append(Part(tokens, len(opening), len(opening) + 1))
        return Sheet([fact], queries)
