"""A few workers, each with one piece of work at a time, replaced when they die or hang. Knows nothing of Ray."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from cortex_core.errors import FINAL_ERRORS
from pipelines.actor_config import CrewConfig

MAX_BACKOFF_S = 60.0


class Worker(Protocol):
    """Somebody who can be called and who can die: an actor, or an object in this process."""

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        """Call `method` of the object; never waits for an actor."""
        ...

    def kill(self) -> None:
        """End it, whatever it is doing."""
        ...


class Local:
    """A worker in this process: a call has been answered when it returns. For runs without Ray."""

    def __init__(self, body: Any) -> None:
        self._body = body

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        """Call `method` of the object."""
        answer: Future[Any] = Future()
        try:
            answer.set_result(getattr(self._body, method)(*arguments))
        except Exception as error:  # as from an actor: it comes out where the answer is asked for
            answer.set_exception(error)
        return answer

    def kill(self) -> None:
        """Nothing to end."""


class Outcome(NamedTuple):
    """What has become of a piece of work."""

    work: Any
    """As it was given."""
    answer: Any = None
    lost: str | None = None
    """Why there is no answer; None if there is one."""


@dataclass
class _Seat:
    """A place in the crew, and who sits there."""

    worker: Worker | None = None
    answer: Future[Any] | None = None
    """Of what it is doing: its work, or its start."""
    ready: bool = False
    work: Any = None
    since: float = 0.0
    losses: int = 0
    """In a row."""
    vacant_until: float = 0.0
    why: str = ""
    """Of the last loss."""


class Crew:
    """`tend` it often: it takes up answers, ends who hangs, and hires in place of who is gone. Not thread-safe."""

    def __init__(
        self,
        hire: Callable[[], Worker],
        size: int,
        config: CrewConfig,
        *,
        what: str = "actor",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`hire` starts a worker, without waiting for it; its object has methods `ready` and `work`. `what` it is
        called in errors. Nobody is hired before the first `tend`."""
        self._hire, self._config, self._what, self._clock = hire, config, what, clock
        self._seats = [_Seat() for _ in range(size)]
        self._changed: Future[None] = Future()
        self.restarts = 0

    def __len__(self) -> int:
        return len(self._seats)

    def free(self) -> list[int]:
        """Seats of those who wait for work."""
        return [number for number, seat in enumerate(self._seats) if seat.ready and seat.answer is None]

    def give(self, number: int, work: Any, *arguments: Any) -> None:
        """Have the one on this free seat do `work(*arguments)`; it comes back as the `work` of an outcome."""
        seat = self._seats[number]
        assert seat.worker is not None and seat.ready and seat.answer is None
        seat.work, seat.since = work, self._clock()
        seat.answer = seat.worker.call("work", *arguments)
        self.wake()

    def tend(self) -> list[Outcome]:
        """What has been done or lost since the last time. Never waits.

        Raises RuntimeError when everybody has been lost too often in a row, and at once what cannot come out
        differently another time: an error of a setting or of the data.
        """
        outcomes = []
        for seat in self._seats:
            if seat.worker is None:
                if self._clock() >= seat.vacant_until:
                    self._fill(seat)
            elif seat.answer is not None and (outcome := self._look(seat)) is not None:
                outcomes.append(outcome)
        self._check_hope()
        return outcomes

    def wait(self, timeout_s: float) -> None:
        """Until there is something to tend, at most so long. May be called by several threads."""
        now, until = self._clock(), [timeout_s]
        for seat in self._seats:
            if seat.worker is None:
                until.append(seat.vacant_until - now)
            elif seat.answer is not None:
                until.append(seat.since + self._limit_s(seat) - now)
        pending = [answer for seat in self._seats if (answer := seat.answer) is not None]
        concurrent.futures.wait([*pending, self._changed], max(min(until), 0.0), concurrent.futures.FIRST_COMPLETED)

    def wake(self) -> None:
        """Whoever waits looks again."""
        before, self._changed = self._changed, Future()
        before.set_result(None)

    def close(self) -> None:
        """End everybody. What they were doing is lost."""
        for seat in self._seats:
            worker, seat.worker, seat.answer, seat.ready = seat.worker, None, None, False
            seat.vacant_until = float("inf")
            if worker is not None:
                worker.kill()
        self.wake()

    def describe(self) -> str:
        """Who is doing what for how long."""
        return "; ".join(self._describe(number, seat) for number, seat in enumerate(self._seats))

    def _describe(self, number: int, seat: _Seat) -> str:
        now, name = self._clock(), f"{self._what} {number}"
        lost = f" ({seat.losses} lost in a row, the last one: {seat.why})" if seat.losses else ""
        if seat.worker is None:
            return f"{name} is replaced in {max(seat.vacant_until - now, 0.0):.1f} s{lost}"
        if seat.answer is None:
            return f"{name} waits for work{lost}"
        doing = f"at {seat.work!r}" if seat.ready else "starting"
        return f"{name} is {doing} for {now - seat.since:.1f} s{lost}"

    def _fill(self, seat: _Seat) -> None:
        seat.worker, seat.ready, seat.since = self._hire(), False, self._clock()
        seat.answer = seat.worker.call("ready")
        self.wake()

    def _look(self, seat: _Seat) -> Outcome | None:
        answer = seat.answer
        assert answer is not None
        if not answer.done():
            if self._clock() - seat.since <= self._limit_s(seat):
                return None
            return self._lose(seat, f"did not answer for {self._limit_s(seat):g} s ({self._limit_name(seat)})")
        error = answer.exception()
        if isinstance(error, FINAL_ERRORS):
            raise error
        if error is not None:
            return self._lose(seat, _reason(error))
        seat.answer = None
        if not seat.ready:
            seat.ready = True
            return None
        seat.losses, work, seat.work = 0, seat.work, None
        return Outcome(work, answer.result())

    def _lose(self, seat: _Seat, why: str) -> Outcome | None:
        assert seat.worker is not None
        seat.worker.kill()  # also who has only raised: what state it is in, nobody knows
        outcome = Outcome(seat.work, lost=why) if seat.ready else None
        seat.worker = seat.answer = seat.work = None
        seat.ready, seat.why = False, why
        seat.losses += 1
        self.restarts += 1
        pause = self._config.backoff_s * 2.0 ** min(seat.losses - 2, 30) if seat.losses > 1 else 0.0
        seat.vacant_until = self._clock() + min(pause, MAX_BACKOFF_S)
        self.wake()
        return outcome

    def _check_hope(self) -> None:
        limit = self._config.max_restarts
        if limit >= 0 and all(seat.losses > limit for seat in self._seats):
            raise RuntimeError(
                f"every {self._what} was lost more than max_restarts = {limit} times in a row: {self.describe()}. "
                "See to the reason, or raise max_restarts (-1: no limit)"
            )

    def _limit_s(self, seat: _Seat) -> float:
        return self._config.timeout_s if seat.ready else self._config.start_timeout_s

    def _limit_name(self, seat: _Seat) -> str:
        return (
            "timeout_s"
            if seat.ready
            else f"start_timeout_s; it needs CPU {self._config.num_cpus:g}"
            + (f", GPU {self._config.num_gpus:g}" if self._config.num_gpus else "")
        )


def _reason(error: BaseException) -> str:
    """The line of an error that says what happened: the last of a traceback, the first of what Ray explains."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return f"{type(error).__name__}: {lines[-1 if 'Traceback' in str(error) or 'ray::' in lines[0] else 0]}"[:300]
