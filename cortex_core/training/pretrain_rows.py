"""Rows for backbone pretraining: windows of text and in-window tasks, a pure function of (seed, step)."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from cortex_core.config import TaskName
from cortex_core.tasks.corpus import Corpus
from cortex_core.tasks.digits import DigitTask
from cortex_core.tasks.layout import Example, TextTask
from cortex_core.tasks.mixture import build_task
from cortex_core.tasks.vocabulary import IntArray, TaskVocabulary
from cortex_core.training.pretrain_config import PretrainConfig

Kind = Literal["text", "repeat"] | TaskName
KINDS: tuple[Kind, ...] = ("text", "repeat", *get_args(TaskName))
_FILLERS = ("text", "random")
_EARLY_SHARES = {"text": 0.10, "key_value": 0.75, "repeat": 0.15}  # until recall is learned


class Rows(NamedTuple):
    """One batch: B rows of T tokens."""

    tokens: IntArray
    """int64 [B, T]"""
    text_weight: NDArray[np.float32]
    """Weight of each token in the text loss, [B, T]."""
    answer_weight: NDArray[np.float32]
    """Weight of each token in the answer loss, [B, T]."""
    kinds: NDArray[np.int64]
    """Index into KINDS of each row, [B]."""


@dataclass(frozen=True)
class RowSource:
    """Draws batches. Task rows use training words and training text only."""

    config: PretrainConfig
    vocabulary: TaskVocabulary
    corpus: Corpus
    _tasks: dict[tuple[str, str, int, bool], TextTask] = field(default_factory=dict, repr=False)

    @cached_property
    def any_token(self) -> TaskVocabulary:
        """A vocabulary whose keys and values are all shared tokens: recall must not hang on a few words."""
        pool = MappingProxyType({"train": self.vocabulary.shared_ids})
        return replace(self.vocabulary, keys=pool, values=pool)

    def batch(self, step: int) -> Rows:
        """The rows of optimizer step `step`."""
        rows, size = [], self.config.batch_size
        rng = np.random.default_rng([self.config.seed, 11, step])
        kinds = rng.choice(len(KINDS), size, p=self._shares(step))
        for slot, kind in enumerate(kinds):
            rows.append(self._row(KINDS[kind], step * size + slot, step < self.config.rows.early_steps))
        tokens, text_weight, answer_weight = (np.stack(column) for column in zip(*rows, strict=True))
        return Rows(tokens, text_weight.astype(np.float32), answer_weight.astype(np.float32), kinds)

    def _shares(self, step: int) -> NDArray[np.float64]:
        """Probability of each kind at this step, in the order of KINDS."""
        rows = self.config.rows
        shares: defaultdict[str, float] = defaultdict(float, _EARLY_SHARES)
        if step >= rows.early_steps:
            shares = defaultdict(float, {"text": 1.0 - rows.task_frac, "repeat": rows.repeat_frac})
            shares["key_value"] += rows.key_value_frac
            for name in rows.tasks:
                shares[name] += rows.tasks_frac / len(rows.tasks)
        probabilities = np.maximum([shares[kind] for kind in KINDS], 0.0)
        return probabilities / probabilities.sum()

    def _row(self, kind: Kind, index: int, early: bool) -> tuple[IntArray, NDArray, NDArray]:
        rng = np.random.default_rng([self.config.seed, 12, index])
        window = self.config.decoder.window_tokens
        match kind:
            case "text":
                tokens = self.corpus.excerpt((self.config.seed, 13, index), window, "train")
                return tokens, np.ones(window), np.zeros(window)
            case "repeat":
                return self._repeat(rng, index, window)
            case "key_value":
                return self._key_value(rng, index, window, early)
            case _:
                return self._other(kind, rng, index, window)

    def _other(
        self, name: TaskName, rng: np.random.Generator, index: int, window: int
    ) -> tuple[IntArray, NDArray, NDArray]:
        filler = _FILLERS[int(rng.integers(2))]
        task = self._task(name, filler, any_token=self._any_token(rng))
        if isinstance(task, DigitTask) and rng.random() < self.config.rows.smaller_frac:
            task = task.smaller(rng)
        queries = int(rng.integers(1, self.config.rows.most_queries + 1))
        while queries > 1 and task.max_overhead_tokens(num_queries=queries) > window:
            queries -= 1
        return self._weighted(task.in_window_example(index, window, num_queries=queries), filler, answered=True)

    def _key_value(
        self, rng: np.random.Generator, index: int, window: int, early: bool
    ) -> tuple[IntArray, NDArray, NDArray]:
        rows = self.config.rows
        filler = _FILLERS[int(rng.integers(2))]
        lines = (window - 1) // len(self._task("key_value", filler).sheet(0, 1).facts[0].tokens)
        pairs = 6 if early or rng.random() < 2 / 3 else int(rng.integers(2, rows.max_pairs + 1))
        # At first the questions fill the window: no filler, and as much to learn from as possible.
        queries = lines - pairs if early else int(rng.integers(1, min(rows.many_queries, lines - pairs) + 1))
        answered = rng.random() >= rows.no_facts_frac
        task = self._task("key_value", filler, pairs=pairs, any_token=self._any_token(rng))
        example = task.in_window_example(index, window, num_queries=queries, with_facts=answered)
        return self._weighted(example, filler, answered=answered)

    def _repeat(self, rng: np.random.Generator, index: int, window: int) -> tuple[IntArray, NDArray, NDArray]:
        period = int(rng.integers(8, window // 3))
        if rng.random() < 0.5:
            run = self.corpus.excerpt((self.config.seed, 14, index), period, "train")
        else:
            run = rng.choice(self.vocabulary.shared_ids, period)
        again = np.arange(window) > period
        return np.resize(run, window), np.zeros(window), self.config.repeat_weight * again

    def _weighted(self, example: Example, filler: str, *, answered: bool) -> tuple[IntArray, NDArray, NDArray]:
        """Answers count as answers, or not at all where the facts are missing; the rest as text."""
        weight = 1.0 if filler == "text" else self.config.random_weight
        return example.tokens, weight * ~example.answer, 1.0 * example.answer * answered

    def _any_token(self, rng: np.random.Generator) -> bool:
        return bool(rng.random() < self.config.rows.any_token_frac)

    def _task(self, name: Kind, filler: str, *, pairs: int = 6, any_token: bool = False) -> TextTask:
        key = (name, filler, pairs, any_token)
        if key not in self._tasks:
            assert name not in ("text", "repeat")
            words = self.any_token if any_token else self.vocabulary
            task = build_task(name, filler, words, self.corpus, seed=self.config.seed, num_pairs=pairs)
            self._tasks[key] = task
        return self._tasks[key]
