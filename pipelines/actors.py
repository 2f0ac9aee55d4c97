"""Plain classes as Ray actors. The classes know nothing of Ray, and everything here works on either form."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import ray

HEAD = "node:__internal_head__"
_calling = threading.Lock()


def on_head(kind: type, *arguments: Any) -> Any:
    """An actor of class `kind` that takes no CPU, on the head node: elsewhere it may die with its node."""
    return ray.remote(kind).options(num_cpus=0, resources={HEAD: 0.001}).remote(*arguments)


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
        if not ray.is_initialized():
            raise RuntimeError("Ray is not running any more")
        answer = method.remote(*arguments).future()
    return answer.result(timeout=timeout_s)


def disconnect() -> None:
    """`ray.shutdown()`, but not while another thread is calling an actor: that would start Ray anew."""
    with _calling:
        ray.shutdown()
