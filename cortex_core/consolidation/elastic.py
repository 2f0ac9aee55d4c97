"""Elastic weights: what earlier nights have learned is held where it lies, as firmly as answers depend on it.

Online EWC (Kirkpatrick et al. 2017; Schwarz et al. 2018, "Progress & Compress") on the slow weights. Fisher information
is of the teacher's likeliest answers, one lesson at a time; nights are gathered into epochs, and importance and anchor
change only when an epoch is over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cortex_core import files
from cortex_core.backbone.model import Cortex
from cortex_core.backbone.prompts import answers
from cortex_core.config import FisherConfig
from cortex_core.consolidation.fisher import FisherDiagonal
from cortex_core.consolidation.lessons import Lessons
from cortex_core.consolidation.sleep import Held, slow_values, trained
from cortex_core.errors import DataError

FISHER, SCHEMA = "fisher.safetensors", "cortex-elastic/1"


class ElasticWeights:
    """Watches what a model's slow weights learn, and says what holds them."""

    def __init__(self, model: Cortex, config: FisherConfig, after_backward: Callable[[], None] = lambda: None) -> None:
        """`model` has slow weights already; `after_backward` is called where shards are to be let go."""
        self.model, self.config, self._after_backward = model, config, after_backward
        self.fisher = FisherDiagonal.empty(slow_values(model))
        self._nights = 0

    def held(self) -> Held | None:
        """What holds the slow weights now; None in the first epoch."""
        if not self.fisher.num_epochs:
            return None
        factor, damping = self.config.weight, self.config.damping
        importance = {name: factor * (value + damping) for name, value in self.fisher.values.items()}
        return Held(importance, self.fisher.anchors)

    def learned(self, lessons: Lessons) -> None:
        """A night is over, these were its lessons; every `epoch_nights` they and those before are held from here on."""
        self.observe(lessons)
        self._nights += 1
        if self._nights % self.config.epoch_nights == 0:
            self.anchor()

    def anchor(self) -> None:
        """An epoch is over."""
        self.fisher = self.fisher.anchor(slow_values(self.model), self.config)

    def observe(self, lessons: Lessons) -> None:
        """Add the squared gradients of these lessons' likeliest answers to those of the epoch."""
        values = slow_values(self.model)
        sums = {name: total.clone() for name, total in self.fisher.sums.items()}
        for row in range(len(lessons)):
            for name, gradient in zip(values, self._gradients(lessons.at(torch.tensor([row])), values), strict=True):
                sums[name] += gradient.square()
        self.fisher = replace(self.fisher, sums=sums, num_examples=self.fisher.num_examples + len(lessons))

    def _gradients(self, one: Lessons, values: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        with trained(values):
            nats = answers(self.model, one.prompts).float().log_softmax(-1)
            found = torch.autograd.grad(-nats[0, one.taught.top_ids[0, 0]], list(values.values()))
        self._after_backward()
        return found

    def save(self, folder: str | Path) -> None:
        """Write one file into a folder."""
        tensors, counters = self.fisher.state()
        files.write(Path(folder) / FISHER, SCHEMA, tensors, counters | {"nights": self._nights})

    def load(self, folder: str | Path) -> None:
        """Go on from `save`, for the same slow weights. Raises DataError, IncompatibleError."""
        tensors, notes = files.read(Path(folder) / FISHER, SCHEMA, "Fisher information")
        nights = notes.get("nights")
        if type(nights) is not int or nights < 0:
            raise DataError(f"{Path(folder) / FISHER}: nights = {nights!r} is damaged")
        self.fisher, self._nights = self.fisher.restored(tensors, notes), nights
