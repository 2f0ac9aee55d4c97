"""Kills the processes of a small training at random, two hundred times, and compares what it learned with a quiet run.

The training is real where it matters here: a pool of generators, nights, one checkpoint file per step. What is learned
are a few numbers that depend on every sample, on their order and on every night, bit by bit; and how often each sample
and each night came to them.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator, Set
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks import child
from tests.benchmarks.row import Row
from tests.benchmarks.rows.demo import Demo

KILLS = 200
LOST, TWICE, DIFFERENT = ROWS = ("kills_lost", "kills_twice", "kills_different_bytes")
KINDS = {"generator": 0.6, "sleeper": 0.25, "trainer": 0.15}
"""Who is killed how often. With the trainer go all others."""
BATCH, SLEEP_EVERY, SLEEP_LASTS = 4, 6, 3
SAMPLE_S, NIGHT_S = 0.01, 0.05
MOST_TICKETS, MOST_NIGHTS = 20_000, 2_000
PROGRESS_TIMEOUT_S = 120.0


def two_hundred_kills(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Samples and nights lost, or learned twice, when generators, sleeper and trainer are killed 200 times at random.

    The third row counts bytes in which the final weights differ from those of a run that nobody disturbs
    (max_staleness = 0). All kills are SIGKILL, at random moments, some while the one before is still being recovered
    from. n is the number of kills; of the third row, that of the steps.
    """
    start = time.perf_counter()
    (found,) = child.run(f"{__name__}:measured", kills=KILLS, seed=0, variables={"RAY_worker_niceness": "0"})
    seconds = time.perf_counter() - start
    yield Row(LOST, float(found["lost"]), 0, "lower", "", found["kills"], seconds=seconds)
    yield Row(TWICE, float(found["twice"]), 0, "lower", "", found["kills"])
    yield Row(DIFFERENT, float(found["different_bytes"]), 0, "lower", "bytes", found["steps"])


def measured(kills: int, seed: int) -> dict[str, Any]:
    """In a process of its own."""
    from pipelines.cluster import connect
    from pipelines.config import ClusterConfig

    with tempfile.TemporaryDirectory(prefix="cortex-kills-") as scratch, connect(ClusterConfig(num_workers=1)):
        disturbed, quiet = Path(scratch) / "disturbed", Path(scratch) / "quiet"
        by_kind = _disturb(disturbed, kills, random.Random(seed))
        learned = Learned.read(disturbed)
        _train_to(quiet, learned.step)
        undisturbed = Learned.read(quiet)
    samples, nights = learned.step * BATCH, len(range(0, learned.step - SLEEP_LASTS + 1, SLEEP_EVERY))
    counts = np.concatenate([learned.arrays["samples"][:samples], learned.arrays["nights"][:nights]]).astype(int)
    beyond = learned.arrays["samples"][samples:].sum() + learned.arrays["nights"][nights:].sum()
    return {
        "lost": int((counts == 0).sum()),
        "twice": int(np.maximum(counts - 1, 0).sum() + beyond),
        "different_bytes": learned.different_bytes(undisturbed),
        "kills": sum(by_kind.values()),
        "by_kind": by_kind,
        "steps": learned.step,
        "nights": nights,
    }


class Noise:
    """A source that takes its time."""

    def __init__(self, folder: str) -> None:
        _sign_in(folder, "generator")

    def load(self, version: int, weights: np.ndarray) -> None:
        self.weights = weights

    def generate(self, tickets: list[int]) -> list[np.ndarray]:
        time.sleep(SAMPLE_S * len(tickets))
        return [np.tanh(self.weights + np.random.default_rng(ticket).standard_normal(64)) for ticket in tickets]


class Regression:
    """A consolidator: some steps of gradient descent."""

    def __init__(self, folder: str) -> None:
        _sign_in(folder, "sleeper")

    def consolidate(self, snapshot: dict[str, np.ndarray], lessons: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        time.sleep(NIGHT_S)
        inputs, slow = np.random.default_rng(seed).standard_normal((32, 64)), snapshot["slow"].copy()
        for _ in range(10):
            slow -= 0.01 * inputs.T @ (inputs @ slow - inputs @ lessons) / len(inputs)
        return {"slow": slow - snapshot["slow"]}


class Learned:
    """All that a training has: what its checkpoint holds."""

    def __init__(self) -> None:
        self.step = 0
        self.arrays = {
            "fast": np.zeros(64), "slow": np.zeros(64),
            "samples": np.zeros(MOST_TICKETS, np.uint8), "nights": np.zeros(MOST_NIGHTS, np.uint8),
        }  # fmt: skip
        self.pool: dict[str, Any] | None = None
        self.nights: dict[str, Any] | None = None

    @classmethod
    def read(cls, folder: Path) -> Learned:
        """The last checkpoint; a beginning, if there is none."""
        learned = cls()
        with suppress(FileNotFoundError), np.load(folder / "checkpoint.npz") as file:
            learned.arrays = {name: file[name] for name in learned.arrays}
            state = json.loads(str(file["state"]))
            for night in state["nights"]["pending"]:
                night["lessons"] = np.array(night["lessons"])
            learned.step, learned.pool, learned.nights = state["step"], state["pool"], state["nights"]
        return learned

    def write(self, folder: Path, pool: dict[str, Any], nights: dict[str, Any]) -> None:
        """All of it at once, or nothing."""
        pending = [night | {"lessons": night["lessons"].tolist()} for night in nights["pending"]]
        state = {"step": self.step, "pool": pool, "nights": nights | {"pending": pending}}
        with (folder / "next.npz").open("wb") as file:
            np.savez(file, state=np.array(json.dumps(state)), **self.arrays)  # type: ignore[arg-type]
        os.replace(folder / "next.npz", folder / "checkpoint.npz")

    def different_bytes(self, other: Learned) -> int:
        """In weights and counts, after as many steps."""
        assert self.step == other.step
        pairs = [(mine, other.arrays[name]) for name, mine in self.arrays.items()]
        return sum(int((np.frombuffer(a.tobytes(), "u1") != np.frombuffer(b.tobytes(), "u1")).sum()) for a, b in pairs)


class Training:
    """The trainer, an actor with actors of its own: goes on from its checkpoint until a file says that it may stop."""

    def run(self, where: str) -> None:
        """To the end."""
        from pipelines.actor_config import NightsConfig, PoolConfig
        from pipelines.beside import open_nights, open_pool

        folder, common = Path(where), {"num_cpus": 0.1, "max_restarts": -1, "backoff_s": 0.05, "timeout_s": 60.0}
        learned = Learned.read(folder)
        _sign_in(where, "trainer")
        with (
            open_pool(partial(Noise, where), PoolConfig(max_staleness=0, **common)) as pool,  # type: ignore[arg-type]
            open_nights(partial(Regression, where), NightsConfig(**common)) as nights,  # type: ignore[arg-type]
        ):
            arrays = learned.arrays
            if learned.pool is not None and learned.nights is not None:
                pool.load_state_dict(learned.pool)
                nights.load_state_dict(learned.nights, learned.step, {"slow": arrays["slow"]})
            while not (folder / "stop").exists() or learned.step < int((folder / "stop").read_text()):
                pool.publish(learned.step, arrays["fast"] + arrays["slow"])
                for sample in pool.take(BATCH, PROGRESS_TIMEOUT_S):
                    arrays["fast"] = np.tanh(0.9 * arrays["fast"] + 0.2 * sample.value)
                    arrays["samples"][sample.ticket] += 1
                if learned.step % SLEEP_EVERY == 0:
                    nights.submit(learned.step, {"slow": arrays["slow"]}, arrays["fast"].copy())
                elif learned.step % SLEEP_EVERY == SLEEP_LASTS - 1:
                    night = nights.wait(PROGRESS_TIMEOUT_S)
                    verdict = nights.merge(night, {"slow": arrays["slow"]}, night.version)
                    assert verdict.merged
                    arrays["nights"][night.number] += 1
                learned.step += 1
                learned.write(folder, pool.state_dict(), nights.state_dict())


class _Trainer:
    """Keeps one at work."""

    def __init__(self, folder: Path) -> None:
        (folder / "processes").mkdir(parents=True)
        self._folder = folder
        self.done = False
        self._start()

    def _start(self) -> None:
        from pipelines.actors import Actor

        self._actor = Actor(Training, num_cpus=0.1)
        self._answer: Future[None] = self._actor.call("run", str(self._folder))

    def wait(self, timeout_s: float) -> None:
        """So long, or until it has died and is replaced, or has ended."""
        from ray.exceptions import RayActorError

        concurrent.futures.wait([self._answer], timeout_s)
        if self._answer.done():
            try:
                self._answer.result()
                self.done = True
            except RayActorError:
                self._start()

    def close(self) -> None:
        self._actor.kill()


def _disturb(folder: Path, kills: int, draw: random.Random) -> dict[str, int]:
    """A training with so many kills, and a few quiet steps at the end. Returns whom it hit how often."""
    trainer, found = _Trainer(folder), dict.fromkeys(KINDS, 0)
    try:
        while sum(found.values()) < kills:
            if draw.random() < 0.4:
                _wait_for_step(trainer, folder, _step(folder) + 1)
            trainer.wait(draw.uniform(0.0, 0.2))
            (kind,) = draw.choices([*KINDS], [*KINDS.values()])
            if living := _living(folder, kind):
                os.kill(draw.choice(living), signal.SIGKILL)
                found[kind] += 1
        _stop_at(trainer, folder, _step(folder) + 2 * SLEEP_EVERY)
    finally:
        trainer.close()
    return found


def _train_to(folder: Path, step: int) -> None:
    trainer = _Trainer(folder)
    try:
        _stop_at(trainer, folder, step)
    finally:
        trainer.close()


def _stop_at(trainer: _Trainer, folder: Path, step: int) -> None:
    (folder / "stop.next").write_text(str(step))
    os.replace(folder / "stop.next", folder / "stop")
    while not trainer.done:
        _wait_for_step(trainer, folder, _step(folder) + 1)


def _wait_for_step(trainer: _Trainer, folder: Path, step: int) -> None:
    until = time.monotonic() + PROGRESS_TIMEOUT_S
    while _step(folder) < step and not trainer.done:
        if time.monotonic() > until:
            raise RuntimeError(f"no step after step {_step(folder)} within {PROGRESS_TIMEOUT_S:g} s")
        trainer.wait(0.02)


def _step(folder: Path) -> int:
    return Learned.read(folder).step


def _sign_in(folder: str, kind: str) -> None:
    (Path(folder) / "processes" / f"{kind}-{os.getpid()}").touch()


def _living(folder: Path, kind: str) -> list[int]:
    """Processes of a kind that are still ours: another may have got the number of one that is gone."""
    found = []
    for file in sorted((folder / "processes").glob(f"{kind}-*")):
        pid = int(file.name.rpartition("-")[2])
        with suppress(OSError):
            if b"ray::" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
                continue
        file.unlink()
    return found
