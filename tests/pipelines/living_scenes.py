"""A small run with a life beside its training, and readers of it whose nights are slept elsewhere."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cortex_core.backbone.load import in_assets
from cortex_core.backbone.sidecar_files import read
from cortex_core.consolidation.guard import DriftGuard
from cortex_core.consolidation.sleep import slow_values
from cortex_core.consolidation.sleeper import Sleeper
from cortex_core.training.life import Life, new_sleeper
from pipelines.away import AwaySleeper, PooledDreams
from pipelines.config import RunConfig, load_config
from pipelines.crew import Crew, Local
from pipelines.dreaming import source
from pipelines.duties import Consolidating, Generating
from pipelines.nights import Nights
from pipelines.pool import Pool
from pipelines.slow_actor import consolidator
from tests.consolidation import sleepers

SIDECARS = f"{sleepers.NAME}/sidecars"


def run_config(**changes: object) -> RunConfig:
    """Three days of four facts in six steps, without Ray; dots in names of `changes` are written as two underscores."""
    settings: dict[str, object] = {
        "name": "living", "out_dir": "nowhere", "sidecars": SIDECARS, "data.max_bytes": 400_000,
        "backbone": {"name": sleepers.NAME, "dtype": "float32", "segment_tokens": 256},
        "fast_weights": read(in_assets(SIDECARS)).fast_weights.model_dump(),
        "tasks": {"names": ["key_value"], "fillers": ["text"], "num_pairs": 4},
        "optimizer": {"gate_learning_rate": 1e-3, "output_learning_rate": 6e-3},
        "training": {
            "steps": 6, "batch_size": 2, "in_window_batch_size": 0, "filler_windows": 0, "max_segments": 2,
            "short_frac": 0.0, "checkpoint_every_steps": 2, "report_every_steps": 1,
        },
        "life": {"beside_training": True, "num_facts": 12, "facts_per_day": 4, "lead_tokens": [0, 20]},
        "sleep": {
            **sleepers.QUICK.model_dump(include={"every_tokens", "steps", "slots", "questions"}),
            "guard_windows": 2, "dreams_per_night": 12,
        },
        "scenario": {"max_filler_tokens": 6, "max_lines": 2, "batch_size": 12},
        "sleep_actor": {"synchronous": True, "backoff_s": 0.0, "num_cpus": 0.2},
        "dream_actors": {"max_staleness": 0, "tickets_per_call": 5, "num_generators": 1, "num_cpus": 0.2},
        "evaluation": {
            "fillers": ["text"], "gaps_tokens": [0], "num_examples": 4, "batch_size": 4, "perplexity_tokens": 2048,
        },
        "cluster.num_workers": 0, "sharding.stage": 0, "tracking.system_metrics": False,
    }  # fmt: skip
    return load_config(overrides=settings | {name.replace("__", "."): value for name, value in changes.items()})


def local_nights(config: RunConfig) -> Nights:
    """Slept in this process as soon as they are handed in."""
    return Nights(Crew(lambda: Local(Consolidating(consolidator(config))), 1, config.sleep_actor), config.sleep_actor)


def local_pool(config: RunConfig) -> Pool:
    """Dreams that are made in this process when they are taken."""
    crew = Crew(lambda: Local(Generating(source(config), lambda shared: shared)), 1, config.dream_actors)
    return Pool(crew, config.dream_actors)


def alone(mine: Any = None) -> Any:
    """`from_first` of the only worker."""
    return mine


def plain(config: RunConfig, **guarded: Any) -> Sleeper:
    """A reader that sleeps where it reads."""
    return sleepers.sleeper(guard=_guard(**guarded), **_sleep(config))


def away(
    config: RunConfig, nights: Nights | None, from_first: Callable[[Any], Any] = alone,
    kind: type[AwaySleeper] = AwaySleeper, **guarded: Any,
) -> AwaySleeper:  # fmt: skip
    """The same whose nights are slept elsewhere."""
    return kind(
        sleepers.fresh_model(), config.sleep, config.replay, encode=sleepers.encode, guard=_guard(**guarded),
        nights=nights, config_of_nights=config.sleep_actor, from_first=from_first, patience_s=60.0,
    )  # fmt: skip


def life(config: RunConfig, pool: Pool | None = None, from_first: Callable[[Any], Any] = alone) -> Life:
    """That of a run, its nights slept where it reads; its dreams from a pool, if there is one."""
    pooled = partial(PooledDreams, pool=pool, patience_s=60.0, from_first=from_first)
    reader = new_sleeper(
        sleepers.fresh_model(), sleepers.encode, sleepers.corpus(), config.sleep, config.replay, config.dream,
        **({"dreams": pooled} if pool else {}),
    )  # fmt: skip
    return Life(reader, config.life, sleepers.book().vocabulary, sleepers.book().filler)


def slow(reader: Sleeper) -> dict[str, Tensor]:
    """A copy of the slow weights."""
    return {name: value.detach().clone() for name, value in slow_values(reader.model).items()}


class Two:
    """Two workers in two threads: what the first gives, both have; whoever waits in vain gives up."""

    def __init__(self) -> None:
        self._barrier, self._box = threading.Barrier(2, timeout=60.0), b""

    def from_first(self, rank: int) -> Callable[[Any], Any]:
        """That of one of them."""

        def give(mine: Any = None) -> Any:
            if rank == 0:
                self._box = pickle.dumps(mine)
            self._barrier.wait()
            found = pickle.loads(self._box)
            self._barrier.wait()
            return found

        return give

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """`work(rank)` of both; raises what the one that failed first has raised."""
        found, errors = [None, None], list[BaseException]()

        def one(rank: int) -> None:
            try:
                found[rank] = work(rank)
            except BaseException as error:
                errors.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
        return found


def _guard(bound_nats: float = 0.01) -> DriftGuard:
    return DriftGuard(sleepers.windows(2), bound_nats)


def _sleep(config: RunConfig) -> dict[str, Any]:
    return {name: getattr(config.sleep, name) for name in type(config.sleep).model_fields}


def shift(reader: Sleeper) -> None:
    """The sidecars are trained a little."""
    with torch.no_grad():
        for sidecar in reader.model.sidecars_by_layer.values():
            sidecar.output_gate += 0.01
