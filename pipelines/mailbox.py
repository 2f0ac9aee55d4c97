"""What the driver hears of a run. Its actor imports this file and nothing else, or every start would wait for it."""

from __future__ import annotations

from collections import deque
from typing import Any


class Mailboxes:
    """A mailbox for each name: of many runs at a time, in one actor."""

    def __init__(self) -> None:
        self._boxes: dict[str, Mailbox] = {}

    def post(self, name: str, item: dict[str, Any]) -> None:
        """Leave a report."""
        self._boxes.setdefault(name, Mailbox()).post(item)

    def after(self, name: str, seen: int) -> list[tuple[int, dict[str, Any]]]:
        """As `Mailbox.after`."""
        return self._boxes[name].after(seen) if name in self._boxes else []


class Mailbox:
    """Reports on their way from Ray Train's controller to the driver. The newest win if nobody takes them."""

    def __init__(self, size: int = 1000) -> None:
        self._items: deque[tuple[int, dict[str, Any]]] = deque(maxlen=size)
        self._posted = 0

    def post(self, item: dict[str, Any]) -> None:
        """Leave a report."""
        self._posted += 1
        self._items.append((self._posted, item))

    def after(self, seen: int) -> list[tuple[int, dict[str, Any]]]:
        """All reports numbered above `seen`, oldest first, with their numbers, which start at 1. Asking again after an
        answer that came too late loses nothing."""
        return [(number, item) for number, item in self._items if number > seen]
