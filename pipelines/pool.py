"""Samples for training from a crew of generators, each exactly once, none too stale. Knows nothing of Ray.

Queue and ledger live here, beside training: there is no process to lose between it and the generators. If training dies
its checkpoint says which tickets it had used, and all others are issued again.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NamedTuple

from pipelines.actor_config import PoolConfig
from pipelines.crew import Crew, Outcome
from pipelines.ledger import Ledger

JOIN_TIMEOUT_S = 10.0


class Sample(NamedTuple):
    """What training gets."""

    ticket: int
    version: int
    """Of the weights that made it."""
    value: Any


class _Errand(NamedTuple):
    """What a generator is sent for."""

    version: int
    tickets: list[int]

    def __repr__(self) -> str:
        return f"tickets {self.tickets} of version {self.version}"


class Pool:
    """`publish` weights, `take` samples; in between generators work on. As a context manager, nobody is left after it.

    With `max_staleness = 0` the samples are those of a single process: in order of their tickets, from the weights of
    the last `publish`. Otherwise the oldest come first. A sample that is too stale is dropped and its ticket issued
    again, once: the second time training waits for it, or what takes long would never be learned.
    """

    def __init__(
        self,
        crew: Crew,
        config: PoolConfig,
        *,
        share: Callable[[Any], Any] = lambda weights: weights,
        tended: bool = False,
        name: str = "dream",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`share` puts weights, once per version, to where all generators fetch them. `tended` also looks after the
        crew while training is busy elsewhere, in a thread. `name` stands before its metrics."""
        self._crew, self._config, self._share, self._name, self._clock = crew, config, share, name, clock
        self._ledger = Ledger()
        self._lock = threading.RLock()
        self._thread = threading.Thread(target=self._tend_on, name=f"{name}-pool", daemon=True) if tended else None
        self._closed = False
        self._failure: BaseException | None = None
        self._version: int | None = None
        self._shared: Any = None
        self._queue: dict[int, Sample] = {}
        self._under_way: dict[int, int] = {}
        """Of each ticket that is out, the version that it is made with."""
        self._late: set[int] = set()
        self._fatal: Counter[int] = Counter()
        self._batch = self._demand = self._taken = self._stale = self._reissued = 0
        self._wait_s = self._staleness = 0.0

    def __enter__(self) -> Pool:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def publish(self, version: int, weights: Any) -> None:
        """From here on samples are made with these weights. What is too stale for them is dropped."""
        self._check()
        if self._version is not None and version <= self._version:
            raise ValueError(f"version = {version}: must be above {self._version}, the last one that was published")
        shared = self._share(weights)
        with self._lock:
            self._version, self._shared = version, shared
            self._drop([ticket for ticket, sample in self._queue.items() if self._too_stale(sample.version)])
            self._go_on()

    def take(self, n: int, timeout_s: float) -> list[Sample]:
        """`n` samples that nobody has taken before. Raises TimeoutError that says what the generators were doing, and
        RuntimeError when they are lost for good."""
        if not 0 < n <= self._config.queue_items:
            raise ValueError(
                f"take(n = {n}): must be from 1 to {self._config.queue_items}, queue_items. Take fewer, or raise it"
            )
        if self._version is None:
            raise ValueError("take: there are no weights yet. Call publish(version, weights) first")
        start = self._clock()
        try:
            while True:
                with self._lock:
                    self._check()
                    self._batch = self._demand = n
                    chosen = self._choose(n)
                    if chosen is None:
                        self._tend()
                        chosen = self._choose(n)
                    if chosen is not None:
                        return self._hand_over(chosen)
                left = start + timeout_s - self._clock()
                if left <= 0.0:
                    raise TimeoutError(self._missing(n, timeout_s))
                self._crew.wait(left)
        finally:
            self._demand, self._wait_s = 0, self._clock() - start

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint of what has been learned from the samples taken so far."""
        with self._lock:
            return self._ledger.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint. Before the first `publish`."""
        if self._version is not None:
            raise ValueError("load_state_dict: generators are working already. Call it before publish")
        self._ledger.load_state_dict(state)

    def metrics(self) -> dict[str, float]:
        """How it goes: `queue_items` wait now; `staleness_versions` is the mean, `wait_s` the wait of the last
        `take`; `accept_frac` is the share of finished samples that were not too stale, `restarts` of generators
        and `reissued` tickets are counted from the start."""
        with self._lock:
            finished = self._taken + len(self._queue) + self._stale
            values = {
                "queue_items": len(self._queue),
                "staleness_versions": self._staleness,
                "accept_frac": 1.0 - self._stale / finished if finished else 1.0,
                "restarts": self._crew.restarts,
                "reissued": self._reissued,
                "wait_s": self._wait_s,
            }
        return {f"{self._name}/{name}": float(value) for name, value in values.items()}

    def close(self) -> None:
        """End all generators. What they were doing is lost, and issued again when training goes on."""
        with self._lock:
            self._closed = True
            self._crew.close()
            self._shared = None
        if self._thread is not None and self._thread.is_alive():
            self._thread.join(JOIN_TIMEOUT_S)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise RuntimeError("the pool is closed: its generators have ended")

    def _tend_on(self) -> None:
        """In the thread."""
        while True:
            with self._lock:
                if self._closed:
                    return
                try:
                    self._tend()
                except BaseException as error:
                    self._failure = error
                    self._crew.wake()
                    return
            self._crew.wait(JOIN_TIMEOUT_S / 2)

    def _tend(self) -> None:
        for outcome in self._crew.tend():
            self._receive(outcome)
        self._send()

    def _receive(self, outcome: Outcome) -> None:
        version, tickets = outcome.work
        for ticket in tickets:
            del self._under_way[ticket]
        if outcome.lost is not None:
            self._ledger.lose(tickets)
            self._reissued += len(tickets)
            self._blame(tickets, outcome.lost)
            return
        if len(outcome.answer) != len(tickets):
            raise RuntimeError(
                f"{len(outcome.answer)} samples for {len(tickets)} tickets: Source.generate must return one for each"
            )
        self._ledger.deliver(tickets)
        for ticket, value in zip(tickets, outcome.answer, strict=True):
            self._queue[ticket] = Sample(ticket, version, value)
        if self._too_stale(version):
            self._drop(tickets)

    def _blame(self, tickets: list[int], why: str) -> None:
        """A ticket that takes every generator with it would go round for ever."""
        self._fatal.update(tickets)
        limit = self._config.max_restarts
        for ticket in tickets:
            if 0 <= limit < self._fatal[ticket]:
                raise RuntimeError(
                    f"ticket {ticket}: {self._fatal[ticket]} generators were lost with it, max_restarts = {limit}; the "
                    f"last one: {why}. Look at what Source.generate makes of this ticket, or raise max_restarts"
                )

    def _drop(self, tickets: list[int]) -> None:
        for ticket in tickets:
            del self._queue[ticket]
        self._ledger.reject(tickets)
        self._late.update(tickets)
        self._stale += len(tickets)
        self._reissued += len(tickets)

    def _send(self) -> None:
        """Work for whoever is free, while there is room. More than training can use before it is too stale is not
        begun: `max_staleness` batches beside the one that it waits for."""
        if self._version is None:
            return
        free = self._crew.free()
        for number in free:
            useful = self._config.max_staleness * self._batch + self._demand
            room = min(self._config.queue_items, useful) - len(self._queue) - len(self._under_way)
            if room <= 0:
                return
            # Training that waits for all of them has them soonest if everybody helps; otherwise a call is to be full.
            share = room if self._config.max_staleness else -(-room // len(self._crew))
            tickets = self._ledger.issue(min(share, self._config.tickets_per_call))
            self._under_way.update(dict.fromkeys(tickets, self._version))
            self._crew.give(number, _Errand(self._version, tickets), tickets, self._version, self._shared)

    def _too_stale(self, version: int) -> bool:
        assert self._version is not None
        return self._version - version > self._config.max_staleness

    def _choose(self, n: int) -> list[int] | None:
        """Tickets for training, in order; None while it has to wait."""
        if len(self._queue) < n:
            return None
        if self._config.max_staleness == 0:
            chosen = sorted(self._queue)[:n]
            return chosen if chosen[-1] < self._ledger.first_missing() else None
        assert self._version is not None
        last_call = self._version - self._config.max_staleness
        if any(version <= last_call and ticket in self._late for ticket, version in self._under_way.items()):
            return None
        return sorted(self._queue, key=lambda ticket: (self._queue[ticket].version, ticket))[:n]

    def _hand_over(self, chosen: list[int]) -> list[Sample]:
        assert self._version is not None
        samples = [self._queue.pop(ticket) for ticket in chosen]
        self._ledger.use(chosen)
        self._late.difference_update(chosen)
        for ticket in chosen:
            del self._fatal[ticket]
        self._taken += len(samples)
        self._staleness = sum(self._version - sample.version for sample in samples) / len(samples)
        self._demand = 0
        self._go_on()
        return samples

    def _go_on(self) -> None:
        """There may be room again. If somebody else can see to that, training need not."""
        if self._thread is not None and self._thread.is_alive():
            self._crew.wake()
        else:
            self._tend()

    def _missing(self, n: int, timeout_s: float) -> str:
        with self._lock:
            return (
                f"{len(self._queue)} of {n} samples after timeout_s = {timeout_s:g}: {self._crew.describe()}. "
                "Raise timeout_s or num_generators, or see to what holds them up"
            )
