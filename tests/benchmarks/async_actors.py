"""Times training beside actors that are somewhere else: here they do nothing for as long as an accelerator would work.

What generation takes is simulated, with a long tail as that of answers of a language model: every sample has a length,
lognormal, that depends on its ticket alone; a night takes as long as a step. Training burns a fixed amount of this
machine's CPU time per step. All else is real: actors, weights through the object store, queue, ledger, merging.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Set
from functools import partial
from typing import Any

import numpy as np

from tests.benchmarks import child, pairs
from tests.benchmarks.row import Row
from tests.benchmarks.rows.demo import Demo

ACTORS_ON, ASYNC = ROWS = ("actors_on_throughput_ratio", "async_over_sync_throughput")
SIGMA = 1.0
"""Of the logarithm of a sample's time: the longest of 1,000 takes about 13 times the mean."""
BATCH, WEIGHTS, SLOW, NIGHT_S = 6, 250_000, 1_000_000, 0.5
TAKE_TIMEOUT_S = 120.0
VARIABLES = {"RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""The time that one thread takes is what is burnt."""
ON_PAIRS, ON_STEPS, ON_STEP_S, ON_MEDIAN_S = 12, 4, 0.5, 0.1
ASYNC_PAIRS, ASYNC_STEPS, ASYNC_STEP_S, ASYNC_MEDIAN_S, STALENESS = 10, 12, 0.1, 0.12, 8


def training_beside_actors(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Steps per second: with actors at work over without; and not waiting for samples over waiting for them.

    First row: training takes its samples from a pool of three and publishes 1 MB of weights every step, and an actor
    sleeps: a night of 0.5 s is handed in with 4 MB of slow weights as soon as the one before is merged. Or training has
    its samples at hand, and nobody sleeps. 0.5 s of CPU time per step. Second row: max_staleness = 8 over 0, six samples
    per step from six generators; a sample takes 0.2 s in the mean, which six generators need for a batch, too, and a step
    0.1 s of CPU time. Medians of interleaved pairs.
    """
    for name, goal, function in ((ACTORS_ON, 0.95, "on_over_off"), (ASYNC, 2.5, "async_over_sync")):
        if name in wanted:
            start = time.perf_counter()
            (ratios,) = child.run(f"{__name__}:{function}", variables=VARIABLES)
            found = pairs.median(ratios)
            seconds = time.perf_counter() - start
            yield Row(name, found.value, goal, "higher", "", found.n, found.low, found.high, seconds)


class Simulated:
    """An accelerator somewhere else."""

    def __init__(self, median_s: float) -> None:
        self.median_s = median_s

    def load(self, version: int, weights: np.ndarray) -> None:
        self.weights = weights

    def generate(self, tickets: list[int]) -> list[np.ndarray]:
        """As long as the longest of them takes: they are a batch."""
        draws = [np.random.default_rng(ticket) for ticket in tickets]
        time.sleep(max(draw.lognormal(np.log(self.median_s), SIGMA) for draw in draws))
        return [draw.standard_normal(64) for draw in draws]


class SimulatedNight:
    """A sleeper somewhere else."""

    def consolidate(self, snapshot: dict[str, np.ndarray], lessons: Any, seed: int) -> dict[str, np.ndarray]:
        """Something small to add."""
        time.sleep(NIGHT_S)
        return {name: np.full_like(value, 1e-3) for name, value in snapshot.items()}


class Training:
    """Some steps, each with its CPU time, its samples and its new weights."""

    def __init__(self, step_s: float) -> None:
        self._matrix = np.random.default_rng(0).standard_normal((192, 192)) / 16
        self._rounds, self.weights, self.version = 1, np.zeros(WEIGHTS, np.float32), 0
        self.slow, self.num_nights = {"slow": np.zeros(SLOW, np.float32)}, 0
        self.burn()  # the first product is slow
        while (seconds := self._cpu_s()) < 0.05:
            self._rounds *= 2
        self._rounds = max(1, round(self._rounds * step_s / seconds))

    def steps(self, count: int, samples: Callable[[], Any], publish: Callable[[int, Any], None]) -> None:
        for _ in range(count):
            given = samples()
            self.burn()
            self.weights[:64] += given[0]
            self.version += 1
            publish(self.version, self.weights)

    def on(self, pool: Any, count: int, nights: Any = None) -> None:
        """With the samples of a pool; and with nights, one after the other."""

        def publish(version: int, weights: np.ndarray) -> None:
            pool.publish(version, weights)
            if nights is not None:
                self.sleep(nights)

        self.steps(count, lambda: [each.value for each in pool.take(BATCH, TAKE_TIMEOUT_S)], publish)

    def sleep(self, nights: Any) -> None:
        """Merge the night that is over, and hand the next one in."""
        if (night := nights.poll()) is not None:
            self.num_nights += nights.merge(night, self.slow, self.num_nights).merged
        if not nights.state_dict()["pending"]:
            nights.submit(self.num_nights, self.slow, ["lessons"])

    def burn(self) -> None:
        for _ in range(self._rounds):
            self._matrix @ self._matrix  # for the time that it takes

    def _cpu_s(self) -> float:
        start = time.thread_time()  # Ray has threads of its own in this process
        self.burn()
        return time.thread_time() - start


def on_over_off() -> list[float]:
    """In a process of its own: throughput with actors over that without, pair by pair."""
    from pipelines.actor_config import NightsConfig, PoolConfig
    from pipelines.beside import open_nights, open_pool
    from pipelines.cluster import connect
    from pipelines.config import ClusterConfig

    config = PoolConfig(num_generators=3, max_staleness=4, tickets_per_call=BATCH, num_cpus=0.1)
    training, at_hand = Training(ON_STEP_S), [np.ones(64)] * BATCH
    with (
        connect(ClusterConfig(num_workers=1)),
        open_pool(partial(Simulated, ON_MEDIAN_S), config) as pool,
        open_nights(SimulatedNight, NightsConfig(num_cpus=0.1)) as nights,
    ):
        pool.publish(0, training.weights)
        training.on(pool, 5, nights)
        nights.wait(TAKE_TIMEOUT_S)  # all have started

        def off() -> None:
            training.steps(ON_STEPS, lambda: at_hand, lambda version, weights: None)

        return pairs.ratios(off, lambda: training.on(pool, ON_STEPS, nights), pairs=ON_PAIRS, warm_up=1)


def async_over_sync() -> list[float]:
    """In a process of its own: throughput with staleness over that without, pair by pair."""
    from pipelines.actor_config import PoolConfig
    from pipelines.beside import open_pool
    from pipelines.cluster import connect
    from pipelines.config import ClusterConfig

    source, common = partial(Simulated, ASYNC_MEDIAN_S), {"num_generators": BATCH, "num_cpus": 0.1}
    training, ratios = Training(ASYNC_STEP_S), list[float]()
    with (
        connect(ClusterConfig(num_workers=1)),
        open_pool(source, PoolConfig(max_staleness=STALENESS, **common)) as ahead,  # type: ignore[arg-type]
        open_pool(source, PoolConfig(max_staleness=0, **common)) as abreast,  # type: ignore[arg-type]
    ):
        for pool in (ahead, abreast):
            training.version += 1
            pool.publish(training.version, training.weights)
            training.on(pool, 3)
        for number in range(ASYNC_PAIRS):
            seconds = {}
            for pool in (ahead, abreast) if number % 2 else (abreast, ahead):
                _drain(pool, training)
                start = time.perf_counter()
                training.on(pool, ASYNC_STEPS)
                seconds[pool] = time.perf_counter() - start
            ratios.append(seconds[abreast] / seconds[ahead])
        return ratios


def _drain(pool: Any, training: Training) -> None:
    """What was made while the other way was timed does not count; two steps to get going."""
    while pool.metrics()["dream/queue_items"] >= BATCH:
        pool.take(BATCH, TAKE_TIMEOUT_S)
    training.on(pool, 2)
