"""What the sleep actor does: it holds a model of its own, and sleeps the nights of the one that is trained."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from cortex_core.backbone.load import in_assets
from cortex_core.backbone.model import Cortex
from cortex_core.consolidation.sleep import Evening, consolidate
from cortex_core.errors import IncompatibleError
from pipelines.config import RunConfig
from pipelines.duties import Consolidator

_SAME = "Every node has to see the same sidecars that the run begins with"


def own_model(config: RunConfig) -> Cortex:
    """The model of a run with the sidecars that it begins with and slow weights, whole, in this process."""
    assert config.sidecars is not None
    logging.disable_progress_bar()
    torch.set_num_threads(config.cluster.worker_threads)
    settings = config.backbone.model_dump(exclude={"name"})
    with torch.random.fork_rng(devices=[]):  # without Ray this is the process that trains, which draws its own numbers
        model = Cortex.from_pretrained(config.backbone.name, in_assets(config.sidecars), **settings).eval()
        if not model.fast_weights.slow_slots:
            model.grow_slow_weights(config.sleep.slots, config.sleep.active)
    # An actor sees a GPU if it has reserved one (num_gpus); otherwise its CPU has to do.
    return model.to("cuda") if config.cluster.use_gpu and torch.cuda.is_available() else model


def put(model: Cortex, weights: Mapping[str, Tensor]) -> None:
    """Let `model` have these parameters of sidecars, by name; those that are not given stay as they are. Raises
    IncompatibleError for what it has no place for."""
    try:
        unknown = model.sidecars.load_state_dict(dict(weights), strict=False).unexpected_keys
    except RuntimeError as error:  # of another shape
        raise IncompatibleError(f"sidecars: {str(error).splitlines()[-1].strip()}. {_SAME}") from error
    if unknown:
        raise IncompatibleError(f"sidecars: {unknown[0]} has no place in those of the actor. {_SAME}")


class SlowConsolidator:
    """Learns lessons with the sidecars that it is given. The result depends on those and on the lessons alone."""

    def __init__(self, config: str) -> None:
        """`config`: of the run, as JSON; folders and files that every node sees."""
        self._config = RunConfig.model_validate_json(config)
        self._model = own_model(self._config)

    def consolidate(self, snapshot: Mapping[str, Tensor], lessons: Mapping[str, Tensor], seed: int) -> dict[str, Any]:
        """The change of the slow weights, by name, on the CPU. No random numbers are drawn: `seed` changes nothing."""
        put(self._model, snapshot)
        evening = Evening.from_tensors(lessons, self._model.backbone.device)
        night = consolidate(self._model, evening, self._config.sleep, scaling=self._config.scaling)
        return {name: change.cpu() for name, change in night.delta.items()}


def consolidator(config: RunConfig) -> partial[Consolidator]:
    """What makes one, in whatever process."""
    return partial(SlowConsolidator, config.model_dump_json())
