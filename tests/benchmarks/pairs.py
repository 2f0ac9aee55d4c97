"""Times two ways side by side: alternately, in one session, compared pair by pair. A busy machine slows both."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
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
    found = []
    for number in range(warm_up + pairs):
        order = (first, second) if number % 2 else (second, first)
        seconds = {way: _seconds(way) for way in order}
        found.append(seconds[first] / seconds[second])
    return found[warm_up:]


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
