"""The actors beside training, on Ray: a pool of generators, and one that sleeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray

from pipelines.actor_config import NightsConfig, PoolConfig
from pipelines.actors import Actor
from pipelines.crew import Crew, Local, Worker
from pipelines.duties import Consolidating, Consolidator, Generating, Source
from pipelines.nights import Nights
from pipelines.pool import Pool


def open_pool(source: Callable[[], Source], config: PoolConfig, name: str = "dream") -> Pool:
    """A pool whose generators are actors, each with what `source` makes there. Use it in a `with` block.

    Weights lie in Ray's object store, once for all generators. Without Ray there is one generator, in this process,
    which works when samples are taken.
    """
    if not ray.is_initialized():
        return Pool(Crew(lambda: Local(Generating(source, lambda shared: shared)), 1, config), config, name=name)

    def hire() -> Worker:
        # Spread over the nodes; and not into the placement group of a training worker, which has no room for them.
        options = {"num_cpus": config.num_cpus, "num_gpus": config.num_gpus, "scheduling_strategy": "SPREAD"}
        return Actor(Generating, source, _fetch, **options)

    crew = Crew(hire, config.num_generators, config, what="generator")
    return Pool(crew, config, share=_share, tended=True, name=name)


def open_nights(consolidator: Callable[[], Consolidator], config: NightsConfig) -> Nights:
    """Nights that an actor sleeps, with what `consolidator` makes there; without Ray, this process sleeps them. Use
    it in a `with` block."""
    if not ray.is_initialized():
        return Nights(Crew(lambda: Local(Consolidating(consolidator)), 1, config, what="sleeper"), config)

    def hire() -> Worker:
        options = {"num_cpus": config.num_cpus, "num_gpus": config.num_gpus, "scheduling_strategy": "DEFAULT"}
        return Actor(Consolidating, consolidator, **options)

    return Nights(Crew(hire, 1, config, what="sleeper"), config)


def _share(weights: Any) -> Any:
    return [ray.put(weights)]  # in a list: Ray would fetch a bare reference anew for every call


def _fetch(shared: Any) -> Any:
    return ray.get(shared[0])  # bounded by the pool's timeout_s, after which the generator is replaced
