"""What a dream actor does: it holds a model that has slept, and dreams a ticket at a time. Runs in the actors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import logging

from cortex_core.backbone.model import Cortex
from cortex_core.consolidation.sleep import slow_values
from cortex_core.dreaming.dream import Dream, Dreamer
from cortex_core.dreaming.graph import MemoryGraph
from pipelines.config import RunConfig
from pipelines.duties import Source


class DreamSource:
    """Dreams of a graph with the slow weights that it is given. What a ticket gives depends on those alone."""

    def __init__(self, config: str, sidecars: str, memories: str) -> None:
        """`config`: of the run, as JSON; folders and files that every node sees."""
        self._config = RunConfig.model_validate_json(config)
        logging.disable_progress_bar()
        torch.set_num_threads(self._config.cluster.worker_threads)
        settings = self._config.backbone.model_dump(exclude={"name"})
        self._model = Cortex.from_pretrained(self._config.backbone.name, Path(sidecars), **settings).eval()
        if self._config.cluster.use_gpu:
            self._model.to("cuda")
        self._graph = MemoryGraph.load(memories)
        self._version = 0

    def load(self, version: int, weights: Mapping[str, Tensor]) -> None:
        """Slow weights by name; those that are not given stay as they are."""
        self._version = version
        for name, value in slow_values(self._model).items():
            if name in weights:
                value.data.copy_(weights[name])

    def generate(self, tickets: list[int]) -> list[Dream]:
        """One dream per ticket."""
        return Dreamer(self._model, self._graph, self._config.dream, model_version=str(self._version)).dream(tickets)


def source(config: RunConfig, sidecars: Path, memories: Path) -> partial[Source]:
    """What makes one, in whatever process."""
    return partial(DreamSource, config.model_dump_json(), str(sidecars), str(memories))
