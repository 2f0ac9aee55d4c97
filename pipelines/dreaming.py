"""What a dream actor does: it holds a model that has slept, and dreams a ticket at a time. Runs in the actors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from cortex_core.dreaming.dream import Dream, Dreamer
from cortex_core.dreaming.graph import MemoryGraph
from pipelines.config import RunConfig
from pipelines.duties import Source
from pipelines.slow_actor import own_model, put


class DreamSource:
    """Dreams of a graph with the sidecars that it is given. What a ticket gives depends on those alone."""

    def __init__(self, config: str, memories: str | None) -> None:
        """`config`: of the run, as JSON; folders and files that every node sees. Without `memories`, the file of a
        graph, one comes with the weights."""
        self._config = RunConfig.model_validate_json(config)
        self._model = own_model(self._config)
        self._graph = MemoryGraph.load(memories) if memories else MemoryGraph.of((), self._config.dream.graph)
        self._version = 0

    def load(self, version: int, weights: tuple[Mapping[str, Tensor], MemoryGraph | None]) -> None:
        """Parameters of sidecars by name, and a graph; what is not given stays as it is."""
        parameters, graph = weights
        self._version, self._graph = version, self._graph if graph is None else graph
        put(self._model, parameters)

    def generate(self, tickets: list[int]) -> list[Dream]:
        """One dream per ticket."""
        return Dreamer(self._model, self._graph, self._config.dream, model_version=str(self._version)).dream(tickets)


def source(config: RunConfig, memories: Path | None = None) -> partial[Source]:
    """What makes one, in whatever process."""
    return partial(DreamSource, config.model_dump_json(), str(memories) if memories else None)
