"""What the driver hears of a run. Its actor imports this file and nothing else, or every start would wait for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

OnChange = Callable[[int, int, int], None]
"""Told how many items wait, how many were posted so far, and how many of those were lost unseen."""


class Mailboxes:
    """A mailbox for each name: of many runs at a time, in one actor."""

    def __init__(self, on_change: Callable[[str], OnChange] | None = None) -> None:
        """`on_change` makes that of each mailbox from its name."""
        self._boxes: dict[str, Mailbox] = {}
        self._on_change = on_change

    def post(self, name: str, item: dict[str, Any]) -> None:
        """Leave a report."""
        if name not in self._boxes:
            self._boxes[name] = Mailbox(on_change=self._on_change(name) if self._on_change else None)
        self._boxes[name].post(item)

    def after(self, name: str, seen: int) -> list[tuple[int, dict[str, Any]]]:
        """As `Mailbox.after`."""
        return self._boxes[name].after(seen) if name in self._boxes else []


class Mailbox:
    """Reports on their way from Ray Train's controller to the driver. The newest win if nobody takes them."""

    def __init__(self, size: int = 1000, on_change: OnChange | None = None) -> None:
        self._items: deque[tuple[int, dict[str, Any]]] = deque(maxlen=size)
        self._posted = self._seen = self._lost = 0
        self._on_change = on_change

    def post(self, item: dict[str, Any]) -> None:
        """Leave a report."""
        if len(self._items) == self._items.maxlen and self._items[0][0] > self._seen:
            self._lost += 1
        self._posted += 1
        self._items.append((self._posted, item))
        self._tell()

    def after(self, seen: int) -> list[tuple[int, dict[str, Any]]]:
        """All reports numbered above `seen`, oldest first, with their numbers, which start at 1. Asking again after an
        answer that came too late loses nothing."""
        self._seen = max(self._seen, seen)
        self._tell()
        return [(number, item) for number, item in self._items if number > seen]

    def _tell(self) -> None:
        if self._on_change is not None:
            self._on_change(min(len(self._items), self._posted - self._seen), self._posted, self._lost)
