"""Sleep beside training: lessons are handed in, and what was learned from them comes back later. Knows no Ray."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NamedTuple

from cortex_core.errors import DataError
from pipelines.actor_config import NightsConfig
from pipelines.crew import Crew

Weights = Mapping[str, Any]
"""Tensors or arrays by name. This file imports neither torch nor numpy: an actor has to start quickly."""


class Night(NamedTuple):
    """One that has been slept, and waits to be merged."""

    number: int
    version: int
    """Of the slow weights that it began with."""
    delta: Weights
    """To be added to them."""
    lessons: Any
    """From which it was learned, as they were handed in."""


class Verdict(NamedTuple):
    """What has become of a night."""

    merged: bool
    reason: str = ""
    """Why it was not: `stale`, or `refused` by the guard or because the delta is not finite."""
    given_up: bool = False
    """It was not merged and is not tried again. The caller has its lessons: `Night.lessons`."""


class _Work(NamedTuple):
    """Lessons that have been handed in, and not been settled yet."""

    number: int
    tries: int
    """Before this one."""
    version: int
    snapshot: Weights
    lessons: Any

    def __repr__(self) -> str:
        return f"night {self.number}, try {self.tries + 1}"


class Nights:
    """`submit` lessons and go on training, `poll` now and then, `merge` what comes. As a context manager, nobody is
    left after it.

    What was submitted is kept here until it is merged or given up, so that an actor may die at any time; each night is
    merged at most once. `submit`, then `wait`, then `merge` is what calling the consolidator would be.
    """

    def __init__(self, crew: Crew, config: NightsConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        """A crew of one: nights are slept one after the other, as they were submitted."""
        assert len(crew) == 1
        self._crew, self._config, self._clock = crew, config, clock
        self._next = 0
        self._works: dict[int, _Work] = {}
        self._slept: dict[int, Night] = {}
        self._closed = False
        self._counts = dict.fromkeys(("nights", "merged", "stale", "refused", "given_up"), 0)
        self._wait_s = 0.0

    def __enter__(self) -> Nights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def full(self) -> bool:
        """Whether `submit` has no room."""
        return len(self._works) >= self._config.queue_nights

    def submit(self, version: int, snapshot: Weights, lessons: Any) -> int:
        """Hand lessons in, with the slow weights as they are in this version, of which a copy is kept. Returns the
        number of the night. Never waits."""
        self._check()
        if self.full:
            raise RuntimeError(
                f"{len(self._works)} nights wait already, queue_nights = {self._config.queue_nights}. Call wait and "
                "merge first, sleep less often, or raise queue_nights"
            )
        work = _Work(self._next, 0, version, _copy(snapshot, to_cpu=True), lessons)
        self._works[work.number] = work
        self._next += 1
        self._tend()
        return work.number

    def poll(self) -> Night | None:
        """The oldest night that has been slept and not been merged, if there is one. Never waits. Raises RuntimeError
        when the actor is lost for good."""
        self._check()
        self._tend()
        return self._slept[min(self._slept)] if self._slept else None

    def wait(self, timeout_s: float) -> Night:
        """As `poll`, but waits for it. Raises TimeoutError that says what the actor was doing."""
        if not self._works:
            raise ValueError("wait: no lessons were handed in. Call submit first")
        start = self._clock()
        try:
            while (night := self.poll()) is None:
                left = start + timeout_s - self._clock()
                if left <= 0.0:
                    raise TimeoutError(
                        f"no night has ended within timeout_s = {timeout_s:g}: {self._crew.describe()}. Raise "
                        "timeout_s, or give sleep fewer steps or lessons"
                    )
                self._crew.wait(left)
        finally:
            self._wait_s = self._clock() - start
        return night

    def merge(
        self, night: Night, weights: Weights, version: int, agrees: Callable[[], bool] = lambda: True,
        snapshot: Callable[[], Weights] | None = None,
    ) -> Verdict:  # fmt: skip
        """Add what a night has learned to the slow weights `weights` of this version, in place.

        Not if they have changed too often since, or if `agrees`, asked when it has been added, does not: then they are
        bit for bit what they were, and the lessons are handed in again with the weights as they are now: with
        `weights`, or, where nights begin with more than those, with what `snapshot` gives.
        """
        if self._slept.get(night.number) is not night:
            raise ValueError(f"night {night.number}: is settled already, or was never slept; merge what poll returns")
        if version < night.version:
            raise ValueError(f"version = {version}: must be at least {night.version}, with which the night began")
        _check_fits(night, weights)
        reason = ""
        if version - night.version > self._config.max_staleness:
            reason = "stale"
        elif not _added(night.delta, weights, agrees):
            reason = "refused"
        work = self._works[night.number]
        del self._slept[night.number]
        self._counts[reason or "merged"] += 1
        if not reason or work.tries + 1 >= self._config.max_tries:
            del self._works[night.number]
            self._counts["given_up"] += bool(reason)
            return Verdict(not reason, reason, given_up=bool(reason))
        self._works[night.number] = work._replace(
            tries=work.tries + 1, version=version, snapshot=_copy(snapshot() if snapshot else weights, to_cpu=True)
        )
        self._tend()
        return Verdict(False, reason)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint: the nights that are not settled, with their lessons as they were handed in. The slow
        weights are there already."""
        pending = [
            {"number": work.number, "tries": work.tries, "lessons": work.lessons} for work in self._works.values()
        ]
        return {"next": self._next, "pending": pending}

    def load_state_dict(self, state: Mapping[str, Any], version: int, snapshot: Weights) -> None:
        """Go on from a checkpoint: what was pending is handed in anew, with the slow weights that were in it. Before
        the first `submit`. Raises DataError for what no nights wrote."""
        if self._next:
            raise ValueError("load_state_dict: nights have been handed in already. Call it before submit")
        try:
            works = [
                _Work(int(each["number"]), int(each["tries"]), version, _copy(snapshot, to_cpu=True), each["lessons"])
                for each in state["pending"]
            ]
            following = int(state["next"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"nights: {type(error).__name__}: {error}. The checkpoint is damaged; go on from the one before it"
            ) from error
        numbers = [work.number for work in works]
        if sorted({*numbers}) != sorted(numbers) or any(not 0 <= number < following for number in numbers):
            raise DataError(
                f"nights: pending = {numbers}: must be different numbers from 0 to below next = {following}. The "
                "checkpoint is damaged; go on from the one before it"
            )
        self._next, self._works = following, {work.number: work for work in sorted(works, key=lambda work: work.number)}

    def metrics(self) -> dict[str, float]:
        """Counted from the start: `nights` slept, of which `merged`, `stale`, `refused`; `given_up` after the last try;
        `restarts` of the actor. `wait_s` is that of the last `wait`."""
        values = self._counts | {"restarts": self._crew.restarts, "wait_s": self._wait_s}
        return {f"sleep/{name}": float(value) for name, value in values.items()}

    def close(self) -> None:
        """End the actor. What is not settled stays in `state_dict`."""
        self._closed = True
        self._crew.close()

    def _check(self) -> None:
        if self._closed:
            raise RuntimeError("the nights are closed: their actor has ended")

    def _tend(self) -> None:
        for outcome in self._crew.tend():
            work = outcome.work
            if outcome.lost is None:
                self._counts["nights"] += 1
                self._slept[work.number] = Night(work.number, work.version, outcome.answer, work.lessons)
            # Otherwise it is still the first that has not been slept.
        waiting = [work for number, work in self._works.items() if number not in self._slept]
        if waiting and self._crew.free():
            work = min(waiting, key=lambda work: work.number)
            self._crew.give(0, work, work.snapshot, work.lessons, self._seed(work))

    def _seed(self, work: _Work) -> int:
        return random.Random(f"{self._config.seed}/{work.number}/{work.tries}").getrandbits(31)


def _copy(weights: Weights, *, to_cpu: bool = False) -> dict[str, Any]:
    return {name: _copied(value, to_cpu=to_cpu) for name, value in weights.items()}


def _copied(value: Any, *, to_cpu: bool) -> Any:
    if not hasattr(value, "detach"):
        return value.copy()
    return value.detach().to("cpu", copy=True) if to_cpu else value.detach().clone()


def _check_fits(night: Night, weights: Weights) -> None:
    found = {name: tuple(value.shape) for name, value in night.delta.items()}
    expected = {name: tuple(value.shape) for name, value in weights.items()}
    if found != expected:
        raise ValueError(
            f"night {night.number}: the delta has {found}, the slow weights are {expected}: Consolidator.consolidate "
            "must return one change for each of them, of the same shape"
        )


def _added(delta: Weights, weights: Weights, agrees: Callable[[], bool]) -> bool:
    """Whether it stays added. If not, or if something is raised on the way, the weights are what they were."""
    if not all(bool((change * 0 == 0).all()) for change in delta.values()):
        return False  # infinite, or not a number
    before, stays = _copy(weights), False
    inside = {name: value.detach() if hasattr(value, "detach") else value for name, value in weights.items()}
    try:
        for name, value in inside.items():
            value += delta[name].to(value.device) if hasattr(value, "detach") else delta[name]
        stays = bool(agrees())
    finally:
        if not stays:
            for name, value in inside.items():
                value[...] = before[name]
    return stays
