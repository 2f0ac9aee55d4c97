"""Times two ways side by side: alternately, in one session, compared pair by pair. A busy machine slows both."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple


class Median(NamedTuple):
    """Median of some ratios with a distribution-free 95 % interval; of five or fewer, the smallest and the largest."""

    value: float
    low: float
    high: float
    n: int


def ratios(first: Callable[[], object], second: Callable[[], object], *, pairs: int, warm_up: int = 2) -> list[float]:
    """seconds(first) / seconds(second) of each pair. Who begins alternates, `warm_up` pairs do not count."""
    return ratios_to({"first": first}, second, rounds=pairs, warm_up=warm_up)["first"]


def ratios_to(
    ways: Mapping[str, Callable[[], object]], base: Callable[[], object], *, rounds: int, warm_up: int = 2
) -> dict[str, list[float]]:
    """By way, seconds(way) / seconds(base) of each round, in which all and the base are timed once, one after another.

    Each round begins with the next of them, and `warm_up` rounds do not count.
    """
    order = [base, *ways.values()]
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(warm_up + rounds):
        first = number % len(order)
        seconds = {way: _seconds(way) for way in order[first:] + order[:first]}
        if number >= warm_up:
            for name, way in ways.items():
                found[name].append(seconds[way] / seconds[base])
    return found


def median(values: Sequence[float]) -> Median:
    """The bounds are order statistics: the k-th smallest and largest, k from the binomial distribution."""
    ordered, n = sorted(values), len(values)
    k = 0
    while 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n <= 0.05:
        k += 1
    k = max(k, 1)
    return Median(statistics.median(ordered), ordered[k - 1], ordered[n - k], n)


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes with one thread inside."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _seconds(way: Callable[[], object]) -> float:
    start = time.perf_counter()
    way()
    return time.perf_counter() - start
