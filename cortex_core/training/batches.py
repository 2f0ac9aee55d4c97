"""Which sequences step `n` reads: a function of the seed and the step alone, so any number of workers agrees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from cortex_core.config import TasksConfig, TrainingConfig
from cortex_core.tasks.mixture import Mixture
from cortex_core.training.objectives import Batch

_LENGTH_STREAM = 11


@dataclass(frozen=True)
class BatchSource:
    """Micro-batches of every step. The data cursor of a run is its step number and nothing else."""

    long: Mixture
    in_window: Mixture
    tasks: TasksConfig
    training: TrainingConfig
    segment_tokens: int
    seed: int = 0

    def num_segments(self, step: int) -> int:
        """Segments of the sequences of one step: two at first, then two to `max_segments`."""
        widest = self.training.max_segments
        if step < self.training.short_frac * self.training.steps or widest == 2:
            return 2
        return int(np.random.default_rng([self.seed, step, _LENGTH_STREAM]).integers(2, widest + 1))

    def micro_batches(self, step: int, rank: int, world_size: int) -> Iterator[Batch]:
        """This worker's share of the step's global batch, in `accumulation_steps` parts."""
        parts = self.training.accumulation_steps
        for part in range(parts):
            yield self._batch(step, rank * parts + part, world_size * parts)

    def _batch(self, step: int, part: int, parts: int) -> Batch:
        width, segments = self.segment_tokens, self.num_segments(step)
        rows = _share(self.training.batch_size, step, part, parts)
        tokens, answer = self.long.spanning_batch(
            rows, segments * width, num_queries=self.tasks.num_queries, last_tokens=width
        )
        windows = _share(self.training.in_window_batch_size, step, part, parts)
        shape = (len(rows), segments, width)
        if windows:
            ids, asked = self.in_window.in_window_batch(windows, width, num_queries=self.tasks.num_queries)
        else:
            ids, asked = np.zeros((0, width), np.int64), np.zeros((0, width), np.bool_)
        return Batch(
            torch.from_numpy(tokens).view(shape),
            torch.from_numpy(answer).view(shape),
            torch.from_numpy(ids),
            torch.from_numpy(asked),
        )


def _share(total: int, step: int, part: int, parts: int) -> range:
    """Indices of one of `parts` equal parts of the step's `total` sequences."""
    size = total // parts
    return range(step * total + part * size, step * total + (part + 1) * size)
