"""How well a memory answers while it is trained: the numbers by which to choose between runs, and to stop poor ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from cortex_core.backbone.model import Cortex
from cortex_core.config import EvaluationConfig, ValidationConfig
from cortex_core.eval.metric_names import LOSS, RECALL
from cortex_core.eval.reach import Hits, recall
from cortex_core.tasks.corpus import Corpus
from cortex_core.tasks.mixture import build_task
from cortex_core.tasks.vocabulary import TaskVocabulary


@dataclass(frozen=True)
class Validation:
    """What to ask, with which words, and this worker's share of it.

    `asked` names tasks, fillers and the batch size; `vocabulary` has words set aside. `gather` returns every worker's
    object, in order of rank; all workers run the same number of batches.
    """

    config: ValidationConfig
    asked: EvaluationConfig
    vocabulary: TaskVocabulary
    corpus: Corpus
    num_pairs: int
    seed: int
    rank: int = 0
    world_size: int = 1
    gather: Callable[[Any], list[Any]] = lambda mine: [mine]

    @torch.no_grad()
    def run(self, model: Cortex) -> dict[str, float]:
        """LOSS and RECALL, means over tasks, fillers and gaps; equal on every worker."""
        found = [hits for part in self.gather(list(self._hits(model))) for hits in part]
        losses, rights, kept = 0.0, 0, 0
        for hits in found:
            for index, right, loss in zip(hits.indices, hits.with_memory, hits.loss_nats, strict=True):
                if index < self.config.num_examples:  # workers have equally many, the last ones some too many
                    losses, rights, kept = losses + loss, rights + right, kept + 1
        return {LOSS: losses / kept, RECALL: rights / kept}

    def _hits(self, model: Cortex) -> Iterator[Hits]:
        each, size = -(-self.config.num_examples // self.world_size), self.asked.batch_size
        mine = range(self.rank * each, (self.rank + 1) * each)
        for name in self.asked.tasks:
            for filler in self.asked.fillers:
                task = build_task(
                    name, filler, self.vocabulary, self.corpus, split="validation", seed=self.seed,
                    num_pairs=self.num_pairs,
                )  # fmt: skip
                for first in range(0, each, size):
                    yield from recall(model, task, self.config.gaps_tokens, mine[first : first + size], bare=False)
