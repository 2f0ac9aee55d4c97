"""The actors beside training as real processes: killed, hung, held up, interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch

from pipelines.actor_config import NightsConfig, PoolConfig
from pipelines.beside import open_nights, open_pool
from pipelines.pool import Pool, Sample
from tests.benchmarks import child
from tests.pipelines.beside_scenes import Plain, Watched
from tests.pipelines.test_nights import Regression, lessons, slow

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_here")]
ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 60.0


def config(**settings: Any) -> PoolConfig:
    return PoolConfig(**{"num_generators": 2, "queue_items": 8, "num_cpus": 0.25, "backoff_s": 0.1} | settings)


def until(ready: Callable[[], Any], what: str) -> None:
    """Poll another process's traces."""
    deadline = time.monotonic() + WAIT_S
    while not ready():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def callers(folder: Path) -> list[int]:
    file = folder / "calls"
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def gone(pids: set[int]) -> bool:
    return not any(psutil.pid_exists(pid) for pid in pids)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Path]:
    """A folder in which generators are held up until the test removes `hold`."""
    (tmp_path / "hold").touch()
    yield tmp_path
    (tmp_path / "hold").unlink(missing_ok=True)


def begun(pool: Pool, n: int, folder: Path) -> None:
    """Generators are at work on `n` samples that training wants."""
    with pytest.raises(TimeoutError, match=f"of {n} samples after timeout_s"):
        pool.take(n, 0.0)

    def both_are() -> bool:
        try:
            pool.take(n, 0.05)
        except TimeoutError:
            return len({*callers(folder)}) >= 2
        raise AssertionError("they were to be held up")

    until(both_are, "generators did not begin")


@pytest.mark.parametrize("how", ["SIGKILL", "ray.kill"])
def test_a_generator_that_is_killed_at_work_changes_nothing(held: Path, how: str) -> None:
    with open_pool(partial(Watched, str(held)), config(max_staleness=0)) as pool:
        pool.publish(5, "w5")
        begun(pool, 6, held)
        pid = callers(held)[0]
        if how == "SIGKILL":
            os.kill(pid, signal.SIGKILL)
        else:
            ray.kill(pool._crew._seats[0].worker._actor)  # type: ignore[union-attr]
        (held / "hold").unlink()
        samples = pool.take(6, WAIT_S)
        assert [(sample.ticket, *sample.value[:2]) for sample in samples] == [(n, n, "w5") for n in range(6)]
        assert pool.metrics()["dream/restarts"] == 1.0 and pool.metrics()["dream/reissued"] == 1.0
        pids = {*callers(held)}
    until(lambda: gone(pids), "generators were left")


def test_a_generator_that_hangs_is_replaced(tmp_path: Path) -> None:
    with open_pool(partial(Watched, str(tmp_path)), config(max_staleness=0, timeout_s=2.0)) as pool:
        pool.publish(0, "w")
        pool.take(2, WAIT_S)
        (tmp_path / "hang").touch()
        before = time.monotonic()
        assert [sample.ticket for sample in pool.take(4, WAIT_S)] == [2, 3, 4, 5]
        assert time.monotonic() - before >= 2.0 and pool.metrics()["dream/restarts"] == 1.0


def test_weights_that_come_while_samples_are_made(held: Path) -> None:
    with open_pool(partial(Watched, str(held)), config(max_staleness=1)) as pool:
        pool.publish(0, "w0")
        begun(pool, 4, held)
        for version in (1, 2):
            pool.publish(version, f"w{version}")
        (held / "hold").unlink()
        samples = pool.take(4, WAIT_S)
        pool.publish(3, "w3")
        samples += pool.take(4, WAIT_S)
        assert len({sample.ticket for sample in samples}) == 8
        assert all(sample.value[:2] == (sample.ticket, f"w{sample.version}") for sample in samples)
        assert all(sample.version >= 1 for sample in samples[:4]) and all(sample.version >= 2 for sample in samples[4:])
        assert pool.metrics()["dream/reissued"] >= 1.0 and pool.metrics()["dream/accept_frac"] < 1.0


class Large:
    """Weights and samples that go through the object store."""

    def load(self, version: int, weights: np.ndarray) -> None:
        self.weights = weights

    def generate(self, tickets: list[int]) -> list[np.ndarray]:
        return [self.weights * np.random.default_rng(ticket).standard_normal(len(self.weights)) for ticket in tickets]


def test_without_staleness_two_generators_make_what_one_makes() -> None:
    def learned(generators: int) -> tuple[list[int], bytes]:
        weights, tickets = np.ones(50_000), []
        with open_pool(Large, config(max_staleness=0, num_generators=generators)) as pool:
            for version in range(3):
                pool.publish(version, weights)
                for sample in pool.take(5, WAIT_S):
                    weights = weights + 0.1 * sample.value
                    tickets.append(sample.ticket)
        return tickets, weights.tobytes()

    one = learned(1)
    assert one == learned(2) and one[0] == [*range(15)]


def test_generators_pause_when_the_queue_is_full(tmp_path: Path) -> None:
    with open_pool(partial(Watched, str(tmp_path)), config(queue_items=4, max_staleness=3)) as pool:
        pool.publish(0, "w")
        taken = len(pool.take(2, WAIT_S))
        until(lambda: pool.metrics()["dream/queue_items"] == 4.0, "the queue was not filled while training was busy")
        time.sleep(0.5)
        assert len(callers(tmp_path)) == taken + 4


class Broken(Plain):
    def __init__(self) -> None:
        raise OSError("no model here")


def test_generators_that_cannot_start_end_training_with_the_reason() -> None:
    with open_pool(Broken, config(max_restarts=1)) as pool:
        pool.publish(0, "w")
        with pytest.raises(
            RuntimeError, match=r"^every generator was lost more than max_restarts = 1 times.*no model here"
        ):
            pool.take(1, WAIT_S)


def test_room_that_a_cluster_does_not_have_is_asked_for_by_name() -> None:
    with open_pool(Plain, config(num_cpus=512, max_restarts=0, start_timeout_s=1.0)) as pool:
        pool.publish(0, "w")
        with pytest.raises(RuntimeError, match=r"did not answer for 1 s \(start_timeout_s; it needs CPU 512\)"):
            pool.take(1, WAIT_S)


def test_training_is_not_slowed_by_generators_that_are() -> None:
    """In any order, each once, while one of them keeps dying."""
    with open_pool(Plain, config(max_staleness=2, max_restarts=-1)) as pool:
        samples: list[Sample] = []
        for version in range(12):
            pool.publish(version, f"w{version}")
            samples += pool.take(4, WAIT_S)
            if version % 3 == 0:
                os.kill(samples[-1].value.pid, signal.SIGKILL)
        found = Counter(sample.ticket for sample in samples)
        assert len(found) == 48 and {*found.values()} == {1}
        assert pool.metrics()["dream/restarts"] >= 1.0
        state = pool.state_dict()
    assert state["used_below"] + len(state["used_above"]) == 48 and len(state["used_above"]) <= 16


class Sleepy(Regression):
    def __init__(self, folder: str) -> None:
        torch.set_num_threads(1)
        self.watched = Watched(folder)

    def consolidate(self, snapshot: Any, lessons: Any, seed: int) -> Any:
        self.watched.load(0, "")
        self.watched.generate([0])
        return super().consolidate(snapshot, lessons, seed)


def test_a_sleeper_that_is_killed_at_night_loses_nothing(held: Path) -> None:
    weights = slow()
    with open_nights(partial(Sleepy, str(held)), NightsConfig(num_cpus=0.25, backoff_s=0.1)) as nights:
        for number in range(2):
            nights.submit(0, weights, lessons(number))
        until(lambda: nights.poll() is None and callers(held), "it did not begin")
        os.kill(callers(held)[0], signal.SIGKILL)
        (held / "hold").unlink()
        expected = slow()["map"]
        for number in range(2):
            seed = nights._seed(nights._works[number])
            expected = expected + Regression().consolidate(slow(), lessons(number), seed)["map"]
            night = nights.wait(WAIT_S)
            assert night.number == number and nights.merge(night, weights, number).merged
        assert torch.equal(weights["map"], expected)
        assert nights.metrics()["sleep/restarts"] == 1.0 and nights.metrics()["sleep/merged"] == 2.0
        pids = {*callers(held)}
    until(lambda: gone(pids), "the sleeper was left")


@pytest.mark.nightly
def test_random_kills_of_generators_sleeper_and_trainer_change_nothing() -> None:
    """What `make scoreboard ROW=kills` does two hundred times."""
    (found,) = child.run("tests.benchmarks.kills:measured", kills=8, seed=3, timeout_s=500)
    assert (found["lost"], found["twice"], found["different_bytes"], found["kills"]) == (0, 0, 0, 8), found
    assert found["steps"] >= 12 and found["nights"] >= 2


TRAINING = """
import sys
from functools import partial
from pipelines.actor_config import PoolConfig
from pipelines.beside import open_pool
from pipelines.cluster import connect
from pipelines.config import ClusterConfig
from tests.pipelines.beside_scenes import Watched

with connect(ClusterConfig(num_workers=1)):
    with open_pool(partial(Watched, sys.argv[1]), PoolConfig(num_cpus=0.25)) as pool:
        pool.publish(0, "w")
        pool.take(4, 600.0)
"""


@pytest.mark.parametrize(
    "how",
    [pytest.param(signal.SIGINT, id="Ctrl-C"), pytest.param(signal.SIGTERM, id="SIGTERM", marks=pytest.mark.nightly)],
)
def test_nobody_is_left_when_training_is_interrupted(held: Path, how: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(held)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        until(lambda: len({*callers(held)}) == 2 or process.poll() is not None, "generators did not begin")
        assert process.poll() is None, process.communicate()[1]
        left = {*callers(held)} | {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
        process.send_signal(how)
        _, error = process.communicate(timeout=WAIT_S)
        assert "KeyboardInterrupt" in error
        until(lambda: gone(left), "processes were left")
    finally:
        process.kill()
        process.communicate()
