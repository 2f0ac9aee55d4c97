"""Which sequences step `n` reads: a function of the seed and the step alone, so any number of workers agrees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from cortex_core.config import TasksConfig, TrainingConfig
from cortex_core.tasks.mixture import Mixture
from cortex_core.training.objectives import KL_STRIDE, Batch
from cortex_core.training.schedules import sparsity_factor

_LENGTH_STREAM, _NOISE_STREAM = 11, 12


@dataclass(frozen=True)
class BatchSource:
    """Micro-batches of every step. The data cursor of a run is its step number and nothing else."""

    long: Mixture
    in_window: Mixture
    tasks: TasksConfig
    training: TrainingConfig
    segment_tokens: int
    narrowest: int = 1
    """Narrowest segment of the curriculum: room for all facts and questions of a sequence."""
    seed: int = 0

    def shape(self, step: int) -> tuple[int, int]:
        """Segments and segment width of one step's sequences: two narrow segments at first, wider ones, then more.

        A short way from fact to question is where a gate can learn at all what is worth writing: in a long one, writes
        on filler have overwritten the facts before the question comes.
        """
        training, full = self.training, self.segment_tokens
        done = step / training.steps
        if done < training.short_frac:
            quarter = min(max(full // 4, self.narrowest), full)
            return 2, quarter if done < training.short_frac / 2 else max(full // 2, quarter)
        if training.max_segments == 2:
            return 2, full
        longest = np.random.default_rng([self.seed, step, _LENGTH_STREAM]).integers(2, training.max_segments + 1)
        return int(longest), full

    def tokens(self, step: int) -> int:
        """Tokens that all workers together read in one step; windows count twice: bare and with memory,
        or whole and in short segments."""
        segments, width = self.shape(step)
        long = self.training.batch_size * segments * width
        fillers = len(self._filler_rows(step, 0, 1)) if self.long.fillers else 0
        return long + 2 * (self.training.in_window_batch_size + fillers) * self.segment_tokens

    def _filler_rows(self, step: int, part: int, parts: int) -> range:
        """Windows of filler of one part: none before the write penalty begins, or no gate would learn what to write."""
        if self.training.sparsity_weight * sparsity_factor(step, self.training) == 0.0:
            return range(0)
        return _share(self.training.filler_windows * self.training.batch_size, step, part, parts)

    def calibration_ids(self) -> torch.Tensor:
        """What new addresses are fitted on, int64 [windows, segment_tokens]: such as in-window batches hold."""
        rows = range(self.training.calibration_windows)
        if not rows:
            return torch.zeros(0, self.segment_tokens, dtype=torch.long)
        tokens, _ = self.in_window.in_window_batch(rows, self.segment_tokens, num_queries=self.tasks.num_queries)
        return torch.from_numpy(tokens)

    def micro_batches(self, step: int, rank: int, world_size: int) -> Iterator[Batch]:
        """This worker's share of the step's global batch, in `accumulation_steps` parts."""
        parts = self.training.accumulation_steps
        for part in range(parts):
            yield self._batch(step, rank * parts + part, world_size * parts)

    def _batch(self, step: int, part: int, parts: int) -> Batch:
        segments, width = self.shape(step)
        rows = _share(self.training.batch_size, step, part, parts)
        queries = self.tasks.num_queries
        # A few digits are learned before many: numbers grow with the segments.
        long = self.long.fitting(width, num_queries=queries) if width < self.segment_tokens else self.long
        tokens, answer = long.spanning_batch(rows, segments * width, num_queries=queries, segment_tokens=width)
        windows = _share(self.training.in_window_batch_size, step, part, parts)
        shape = (len(rows), segments, width)
        if windows:
            ids, asked = self.in_window.in_window_batch(
                windows, self.segment_tokens, num_queries=self.tasks.num_queries
            )
        else:
            ids, asked = np.zeros((0, self.segment_tokens), np.int64), np.zeros((0, self.segment_tokens), np.bool_)
        return Batch(
            torch.from_numpy(tokens).view(shape),
            torch.from_numpy(answer).view(shape),
            torch.from_numpy(self._noise(rows, segments * width)).view(shape),
            torch.from_numpy(ids),
            torch.from_numpy(asked),
            torch.from_numpy(self.long.filler_batch(self._filler_rows(step, part, parts), self.segment_tokens)),
        )

    def _noise(self, rows: range, tokens: int) -> np.ndarray:
        """Which tokens of these sequences are written whatever the gate says, bool [rows, tokens]."""
        drawn = [np.random.default_rng([self.seed, row, _NOISE_STREAM]).random(tokens) for row in rows]
        return np.stack(drawn) < self.training.write_noise


def _share(total: int, step: int, part: int, parts: int) -> range:
    """Indices of one of `parts` equal parts of the step's `total` sequences."""
    size = total // parts
    return range(step * total + part * size, step * total + (part + 1) * size)


class BatchShape(NamedTuple):
    """Sizes of one micro-batch of one worker."""

    rows: int
    """Long sequences."""
    segments: int
    width: int
    """Tokens of a segment."""
    windows: int
    """In-window sequences."""
    fillers: int
    """Windows of filler."""
    answers: int
    """Tokens asked for in the last segment of each sequence, and in each window."""
    whole_text: bool = False
    """Whether every token from the second segment on is asked for, too."""

    def batch(self) -> Batch:
        """Such a batch. Its tokens are all the same: nothing here depends on them."""
        ids = torch.zeros(self.rows, self.segments, self.width, dtype=torch.long)
        answer = torch.zeros_like(ids, dtype=torch.bool)
        answer[:, -1, -min(self.answers, self.width - 1) :] = True
        if self.whole_text:
            answer.flatten(1)[:, self.width + 1 :] = True
        windows = torch.zeros(self.windows, self.width, dtype=torch.long)
        asked = torch.zeros_like(windows, dtype=torch.bool)
        # The token before each of these is none of those that are looked at anyway.
        asked[:, KL_STRIDE : KL_STRIDE * (self.answers + 1) : KL_STRIDE] = True
        fillers = torch.zeros(self.fillers, self.width, dtype=torch.long)
        return Batch(ids, answer, torch.zeros_like(answer), windows, asked, fillers)
