"""Who has which ticket. A ticket is the number of one sample, and each is to reach training exactly once."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from cortex_core.errors import DataError


class Ledger:
    """Tickets are free, then out, then delivered, then used; one that is lost on the way is free again.

    Only what training has used outlives it: `state_dict`, which belongs into its checkpoint. Whatever was on its way
    when training died is issued again; what training had used after its last checkpoint it has forgotten, and so has
    the ledger.
    """

    def __init__(self) -> None:
        self._below = 0
        self._above: set[int] = set()
        self._next = 0
        self._returned: list[int] = []
        self._out: set[int] = set()
        self._delivered: set[int] = set()

    @property
    def out(self) -> Collection[int]:
        """Tickets that are being worked on."""
        return self._out

    @property
    def delivered(self) -> Collection[int]:
        """Tickets whose samples wait."""
        return self._delivered

    @property
    def num_used(self) -> int:
        """Tickets that have reached training."""
        return self._below + len(self._above)

    def used(self, ticket: int) -> bool:
        """Whether it has reached training."""
        return ticket < self._below or ticket in self._above

    def first_missing(self) -> int:
        """The smallest ticket that is neither used nor delivered."""
        return min([self._next, *self._out, *self._returned[:1]])

    def issue(self, count: int) -> list[int]:
        """The smallest `count` free tickets, ascending. They are out."""
        issued = []
        for _ in range(count):
            if self._returned:
                issued.append(heapq.heappop(self._returned))
            else:
                issued.append(self._next)
                self._next += 1
        self._out.update(issued)
        return issued

    def deliver(self, tickets: Iterable[int]) -> None:
        """Their samples have come."""
        self._move(tickets, self._out, "out")
        self._delivered.update(tickets)

    def lose(self, tickets: Iterable[int]) -> None:
        """Whoever had them is gone: they are free."""
        self._move(tickets, self._out, "out")
        self._free(tickets)

    def reject(self, tickets: Iterable[int]) -> None:
        """Their samples are of no use any more: they are free."""
        self._move(tickets, self._delivered, "delivered")
        self._free(tickets)

    def use(self, tickets: Iterable[int]) -> None:
        """Training has their samples."""
        self._move(tickets, self._delivered, "delivered")
        self._above.update(tickets)
        while self._below in self._above:
            self._above.remove(self._below)
            self._below += 1

    def state_dict(self) -> dict[str, Any]:
        """What training has used: all tickets below a number, and the few above it. Can be written as JSON."""
        return {"used_below": self._below, "used_above": sorted(self._above)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what training had used; everything else is free. Raises DataError for what no ledger wrote."""
        below, above = state.get("used_below"), state.get("used_above")
        numbers = [below, *above] if isinstance(above, list) else [None]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise DataError(
                f"ledger: used_below = {below!r}, used_above = {above!r}: must be a number and a list of numbers, from "
                "0 on. The checkpoint is damaged; go on from the one before it"
            )
        assert isinstance(below, int) and isinstance(above, list)
        if any(number <= below for number in above) or len({*above}) < len(above):
            raise DataError(
                f"ledger: used_above = {above}: must be different numbers above used_below = {below}. The checkpoint "
                "is damaged; go on from the one before it"
            )
        self._below, self._above = below, {*above}
        self._next = max(above, default=below - 1) + 1
        self._returned = [ticket for ticket in range(below, self._next) if ticket not in self._above]
        self._out, self._delivered = set(), set()

    def _free(self, tickets: Iterable[int]) -> None:
        for ticket in tickets:
            heapq.heappush(self._returned, ticket)

    def _move(self, tickets: Iterable[int], of: set[int], state: str) -> None:
        wrong = sorted({*tickets} - of)
        if wrong:
            raise ValueError(f"tickets {wrong}: must be {state}, or something would reach training twice")
        of.difference_update(tickets)
