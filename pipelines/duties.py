"""What the actors beside training do. They import this file and nothing else, or every start would wait for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol


class Source(Protocol):
    """Makes samples. What it makes depends on the ticket, the version of the weights and its own settings, on nothing
    else: not on the calls before, nor on what other tickets come in the same call."""

    def load(self, version: int, weights: Any) -> None:
        """Take these weights from now on."""
        ...

    def generate(self, tickets: list[int]) -> Sequence[Any]:
        """One sample for each ticket, in their order."""
        ...


class Consolidator(Protocol):
    """Learns over night."""

    def consolidate(self, snapshot: Any, lessons: Any, seed: int) -> Any:
        """What to add to the slow weights of `snapshot`, by name; both in CPU memory. Depends on nothing else."""
        ...


class Generating:
    """A source as an actor."""

    def __init__(self, source: Callable[[], Source], fetch: Callable[[Any], Any]) -> None:
        """`fetch` turns what a pool shares into weights."""
        self._source, self._fetch = source(), fetch
        self._version: int | None = None

    def ready(self) -> None:
        """Answers when it can work."""

    def work(self, tickets: list[int], version: int, shared: Any) -> list[Any]:
        """Samples of this version. Weights are fetched when it changes."""
        if version != self._version:
            self._version = None  # a load that fails leaves neither the old version nor the new one
            self._source.load(version, self._fetch(shared))
            self._version = version
        return [*self._source.generate(list(tickets))]


class Consolidating:
    """A consolidator as an actor."""

    def __init__(self, consolidator: Callable[[], Consolidator]) -> None:
        self._consolidator = consolidator()

    def ready(self) -> None:
        """Answers when it can work."""

    def work(self, snapshot: Any, lessons: Any, seed: int) -> Any:
        """A night."""
        return self._consolidator.consolidate(snapshot, lessons, seed)
