"""Plain classes as Ray actors. The classes know nothing of Ray, and everything here works on either form."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache
from typing import Any

import ray
from ray.util.metrics import Counter, Gauge

HEAD = "node:__internal_head__"
_calling = threading.Lock()


def on_head(kind: type, *arguments: Any, **named: Any) -> Any:
    """An actor of class `kind` that takes no CPU, on the head node: elsewhere it may die with its node."""
    return ray.remote(kind).options(num_cpus=0, resources={HEAD: 0.001}).remote(*arguments, **named)


def send(method: Callable[..., Any], *arguments: Any) -> None:
    """Call a method of an object or of an actor, without waiting for the actor."""
    getattr(method, "remote", method)(*arguments)


def ask(method: Any, *arguments: Any, timeout_s: float) -> Any:
    """Call a method of an object or of an actor and return its result. For threads beside the one that runs
    Ray.

    Raises what Ray raises, TimeoutError, or RuntimeError once `disconnect` was called.
    """
    if not hasattr(method, "remote"):
        return method(*arguments)
    with _calling:
        _check_running()
        answer = method.remote(*arguments).future()
    return answer.result(timeout=timeout_s)


class Actor:
    """An actor in a process of its own, whose calls answer with futures. It ends with `kill`, or with this process."""

    def __init__(self, kind: type, *arguments: Any, **options: Any) -> None:
        """`options` are those of `ray.remote`. Does not wait for it to be placed."""
        with _calling:
            _check_running()
            self._actor: Any = ray.remote(kind).options(**options).remote(*arguments)

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        """Call a method; what it raises, and whatever happens to the actor, is the future's exception."""
        with _calling:
            _check_running()
            return getattr(self._actor, method).remote(*arguments).future()

    def kill(self) -> None:
        """End it on the spot."""
        with _calling:
            if ray.is_initialized():  # it is gone otherwise
                ray.kill(self._actor)


class Gauges:
    """The `on_change` of a mailbox in an actor: Ray's metrics show what it is told, under the name `run`."""

    def __init__(self, run: str) -> None:
        self._tags = {"run": run}
        self._posted = self._lost = 0

    def __call__(self, waiting: int, posted: int, lost: int) -> None:
        """Called in the mailbox's actor."""
        depth, arrived, dropped = _metrics()
        depth.set(waiting, self._tags)
        if posted > self._posted:
            arrived.inc(posted - self._posted, self._tags)
        if lost > self._lost:
            dropped.inc(lost - self._lost, self._tags)
        self._posted, self._lost = posted, lost


def _check_running() -> None:
    if not ray.is_initialized():
        raise RuntimeError("Ray is not running any more")


@cache
def _metrics() -> tuple[Gauge, Counter, Counter]:
    """One of each in a process, for all its mailboxes."""
    return (
        Gauge("cortex_mailbox_waiting", "Reports that the driver has not taken yet.", ("run",)),
        Counter("cortex_mailbox_posted", "Reports that have come.", ("run",)),
        Counter("cortex_mailbox_dropped", "Reports that newer ones have pushed out unseen.", ("run",)),
    )


def disconnect() -> None:
    """`ray.shutdown()`, but not while another thread is calling an actor: that would start Ray anew."""
    with _calling:
        ray.shutdown()
