"""The whole evaluation of one model: recall by gap, drift on text, where the gate opened, speed and sizes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cortex_core.backbone.model import Cortex
from cortex_core.config import EvaluationConfig
from cortex_core.eval.perplexity import TextLoss, drift, text_loss
from cortex_core.eval.reach import Hits, padded, recall
from cortex_core.eval.usage import gate_usage
from cortex_core.intervals import wilson
from cortex_core.tasks.corpus import Corpus
from cortex_core.tasks.layout import TextTask
from cortex_core.tasks.mixture import build_task
from cortex_core.tasks.vocabulary import TaskVocabulary

TEXT_ROW_SEGMENTS = 8
"""Segments per row of held-out text: long enough for a memory to fill up with what it reads."""


@dataclass(frozen=True)
class Suite:
    """What to ask, of which data, and this worker's share of it.

    `gather` returns every worker's object, in order of rank; all workers run the same number of batches, so that
    sharded weights can be gathered in step.
    """

    config: EvaluationConfig
    vocabulary: TaskVocabulary
    corpus: Corpus
    num_pairs: int
    seed: int
    rank: int = 0
    world_size: int = 1
    gather: Callable[[Any], list[Any]] = lambda mine: [mine]
    on_progress: Callable[[float], None] = lambda done_frac: None

    def run(self, model: Cortex) -> dict[str, Any]:
        """The evaluation document, without the run's own fields. Equal on every worker."""
        answered = [row for number, task in enumerate(self._tasks()) for row in self._recall(model, task, number)]
        document: dict[str, Any] = {
            "rows": [row for row, _ in answered],
            # One character per example, "1" where it was right: what a paired comparison of two runs needs.
            "outcomes": ["".join("01"[right] for right in outcomes) for _, outcomes in answered],
            "usage": gate_usage(model, self._task("key_value", "text"), range(self.config.batch_size)),
            "throughput": self._throughput(model),
            "state_bytes": sum(sidecar.state_bytes for _, sidecar in model.ports.values()),
            "sidecar_parameters": sum(p.numel() for p in model.sidecars.parameters()),
            "chance": {name: 1 / len(self.vocabulary.values["held_out"]) for name in ("key_value",)},
            "window_tokens": model.segment_tokens,
        }
        if self.config.perplexity_tokens:
            document["drift"] = self._drift(model)
        return document

    def _task(self, name: Any, filler: str) -> TextTask:
        return build_task(
            name, filler, self.vocabulary, self.corpus, split="held_out", seed=self.seed, num_pairs=self.num_pairs
        )

    def _tasks(self) -> Iterator[TextTask]:
        for name in self.config.tasks:
            for filler in self.config.fillers:
                yield self._task(name, filler)

    def _recall(self, model: Cortex, task: TextTask, number: int) -> Iterator[tuple[dict[str, Any], list[bool]]]:
        """Per gap, with memory on and off: the row, and whether each example was right."""
        gaps, conditions = sorted(set(self.config.gaps_tokens)), len(self.config.tasks) * len(self.config.fillers)
        found: list[Hits] = []
        for batch in self._batches():
            for hits in recall(model, task, gaps, batch):
                found.append(hits)
                self.on_progress((number + len(found) / (len(gaps) * len(self._batches()))) / conditions)
        everyone = [hits for part in self.gather(found) for hits in part]
        for gap in gaps:
            for memory in ("on", "off"):
                right: dict[int, bool] = {}
                for hits in everyone:
                    if hits.gap_tokens == gap:
                        right |= zip(hits.indices, hits.with_memory if memory == "on" else hits.bare, strict=True)
                outcomes = [right[index] for index in range(self.config.num_examples)]
                interval = wilson(sum(outcomes), len(outcomes))
                yield {
                    "task": task.name, "filler": task.filler.name, "gap_tokens": gap, "memory": memory,
                    "accuracy": sum(outcomes) / len(outcomes), "n": len(outcomes),
                    "low": interval.low, "high": interval.high,
                }, outcomes  # fmt: skip

    def _batches(self) -> list[range]:
        """This worker's example indices. Padded beyond `num_examples` so that every worker has equally many batches."""
        each = -(-self.config.num_examples // self.world_size)
        mine = range(self.rank * each, (self.rank + 1) * each)
        size = self.config.batch_size
        return [mine[first : first + size] for first in range(0, each, size)]

    def _drift(self, model: Cortex) -> dict[str, Any]:
        row_tokens = TEXT_ROW_SEGMENTS * model.segment_tokens
        rows = max(2, self.config.perplexity_tokens // row_tokens // self.world_size)
        mine = range(self.rank * rows, (self.rank + 1) * rows)
        facts = self._task("key_value", "text")
        losses = []
        for first in range(0, rows, self.config.batch_size):
            part = mine[first : first + self.config.batch_size]
            text = np.stack([self.corpus.excerpt((self.seed, 5, row), row_tokens, "held_out") for row in part])
            before = [facts.example(row, 0).tokens[: -facts.query_tokens(row)] for row in part]
            ids, mask = padded(before, model.backbone.device)
            assert bool(mask.all())
            losses.append(text_loss(model, torch.from_numpy(text).to(ids.device), ids))
        everyone = [loss for part in self.gather([[x.cpu() for x in loss] for loss in losses]) for loss in part]
        joined = TextLoss(*(torch.cat([loss[i] for loss in everyone]) for i in range(2)))
        corpus = self.corpus
        return drift(joined, corpus.held_out_bytes / len(corpus.held_out)) | {
            "n_tokens": len(joined.bare) * row_tokens,
            "rows": len(joined.bare),
        }

    @torch.no_grad()
    def _throughput(self, model: Cortex, repeats: int = 3) -> dict[str, float]:
        """Reading speed with memory on and off, side by side and interleaved; tokens per second of this worker."""
        rows = 16
        text = np.stack(
            [self.corpus.excerpt((self.seed, 6, row), model.segment_tokens, "held_out") for row in range(rows)]
        )
        ids = torch.from_numpy(text).to(model.backbone.device)
        seconds = {True: float("inf"), False: float("inf")}
        for _ in range(repeats + 1):
            for on in (True, False):
                with model.memory(on):
                    start = _clock(ids.device)
                    model(input_ids=ids)
                    seconds[on] = min(seconds[on], _clock(ids.device) - start)
        return {
            "tokens_per_s_on": ids.numel() / seconds[True],
            "tokens_per_s_off": ids.numel() / seconds[False],
            "ratio": seconds[False] / seconds[True],
        }


def _clock(device: torch.device) -> float:
    """Seconds, once the device has done all that it was given: calls on a GPU return before they are done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
