"""Kills processes of `cortex train` with a life beside it, at random, and compares what it learned with a quiet run.

Nothing here stands for something else: two workers share the backbone (ZeRO-3), an actor sleeps, another one dreams, Ray
Train starts the workers again. Synchronous, so that the run has one result.
"""

from __future__ import annotations

import json
import random
import tempfile
import threading
import time
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tests.benchmarks import child
from tests.benchmarks.row import Row
from tests.benchmarks.rows.demo import Demo
from tests.processes import at_work

KILLS, KILLS_OF_A_RUN = 200, 25
LOST, TWICE, DIFFERENT = ROWS = ("train_kills_lost", "train_kills_twice", "train_kills_different_bytes")
ACTORS = ("ray::Generating", "ray::Consolidating")
KINDS = dict.fromkeys(ACTORS, 0.45) | {"RayTrainWorker": 0.1}
"""Who is killed how often, by a part of the process's name. With a worker go the other one and all actors."""
MOST_PAUSE_S = 3.0
STEPS, FACTS, PER_DAY = 12, 24, 2


def two_hundred_kills_of_a_training(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Dreams and nights lost, or learned twice, when actors and workers of `cortex train` are killed 200 times at random.

    A life beside training; several runs in one Ray session, at most 25 kills in each: SIGKILL, at random moments, some while the one before is
    still being recovered from. A ledger in the last checkpoint says which dreams training has used, the days of its life
    how many it took. The third row counts bytes in which the final sidecars, slow weights and all, differ from those of
    a run that nobody disturbs; the worst of all runs. n is the number of kills.
    """
    start = time.perf_counter()
    (found,) = child.run(
        f"{__name__}:measured", kills=KILLS, seed=0, timeout_s=4 * 3600.0, variables={"RAY_worker_niceness": "0"}
    )
    seconds = time.perf_counter() - start
    yield Row(LOST, float(found["lost"]), 0, "lower", "", found["kills"], seconds=seconds)
    yield Row(TWICE, float(found["twice"]), 0, "lower", "", found["kills"])
    yield Row(DIFFERENT, float(found["different_bytes"]), 0, "lower", "bytes", found["kills"])


def measured(kills: int, seed: int) -> dict[str, Any]:
    """In a process of its own."""
    from pipelines.cluster import connect
    from pipelines.config import ClusterConfig

    total = dict.fromkeys(("lost", "twice", "different_bytes", "runs"), 0)
    by_kind, draw = dict.fromkeys(KINDS, 0), random.Random(seed)
    cluster = ClusterConfig(num_workers=2, cpus_per_worker=0.5)
    with tempfile.TemporaryDirectory(prefix="cortex-kills-") as scratch, connect(cluster):
        quiet = _trained(Path(scratch), "quiet")
        while (left := kills - sum(by_kind.values())) > 0:
            with _killing(draw, min(left, KILLS_OF_A_RUN), by_kind):
                found = _trained(Path(scratch), f"disturbed-{total['runs']}")
            total["lost"] += max(0, quiet.used - found.used) + max(0, quiet.merged - found.merged)
            total["twice"] += max(0, found.taken - found.used) + max(0, found.merged - quiet.merged)
            total["different_bytes"] = max(total["different_bytes"], found.different_bytes(quiet))
            total["runs"] += 1
            print(json.dumps(total | {"by_kind": by_kind}), flush=True)
    return total | {
        "kills": sum(by_kind.values()), "by_kind": by_kind, "dreams_of_a_run": quiet.used, "nights_of_a_run": quiet.merged,
    }  # fmt: skip


class Learned(NamedTuple):
    """What a run has made of its samples."""

    used: int
    """Dreams that its ledger says it has learned from, each of them once."""
    taken: int
    """Dreams that its nights were given."""
    merged: int
    """Nights."""
    sidecars: dict[str, bytes]

    @classmethod
    def of(cls, run: Path) -> Learned:
        """From the last checkpoint and the sidecars of a run that has finished."""
        from safetensors.torch import load_file

        from cortex_core import files
        from cortex_core.backbone.sidecar_files import WEIGHTS
        from pipelines.away import AWAY, SCHEMA
        from pipelines.config import SIDECARS_FOLDER
        from pipelines.life_history import HISTORY

        last = run / "checkpoints" / "result"
        _, notes = files.read(last / AWAY, SCHEMA, "nights")
        ledger, days = notes["pool"]["ledger"], json.loads((last / HISTORY).read_text())["days"]
        found = load_file(run / SIDECARS_FOLDER / WEIGHTS)
        used, taken = ledger["used_below"] + len(ledger["used_above"]), sum(int(day["dream/num"]) for day in days)
        return cls(used, taken, int(notes["version"]), {name: value.numpy().tobytes() for name, value in found.items()})

    def different_bytes(self, other: Learned) -> int:
        """In the sidecars."""
        assert self.sidecars.keys() == other.sidecars.keys()
        pairs = [(mine, other.sidecars[name]) for name, mine in self.sidecars.items()]
        return sum(sum(a != b for a, b in zip(*pair, strict=True)) for pair in pairs if pair[0] != pair[1])


def _trained(out: Path, name: str) -> Learned:
    from pipelines import train
    from tests.pipelines.living_scenes import run_config

    patient = {"max_restarts": -1, "backoff_s": 0.05, "num_cpus": 0.2}
    config = run_config(
        out_dir=str(out), name=name, training__steps=STEPS, training__checkpoint_every_steps=1,
        life__num_facts=FACTS, life__facts_per_day=PER_DAY, sleep__steps=4, sleep__dream_frac=0.5,
        sleep__dreams_per_night=8, cluster__num_workers=2, cluster__cpus_per_worker=0.5, cluster__max_failures=-1,
        sharding__stage=3, sleep_actor={"synchronous": True, **patient},
        dream_actors={"max_staleness": 0, "tickets_per_call": 2, "num_generators": 1, **patient},
    )  # fmt: skip
    assert train.run(config) == 0
    return Learned.of(config.run_dir)


@contextmanager
def _killing(draw: random.Random, most: int, by_kind: dict[str, int]) -> Iterator[None]:
    """Within the block, at most so many kills at random moments; counts whom they hit."""
    over = threading.Event()

    def kill() -> None:
        hit = 0
        while hit < most and not over.wait(draw.uniform(0.0, MOST_PAUSE_S)):
            (kind,) = draw.choices([*KINDS], [*KINDS.values()])
            if not any(at_work(actor) for actor in ACTORS):
                continue  # workers that start would only be started again: nothing can be lost yet
            if living := at_work(kind):
                draw.choice(living).kill()
                by_kind[kind] += 1
                hit += 1

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
