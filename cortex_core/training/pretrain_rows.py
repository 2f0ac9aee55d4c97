"""Rows for backbone pretraining: windows of text and in-window tasks, a pure function of (seed, step)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cortex_core.tasks.corpus import Corpus
from cortex_core.tasks.layout import Example, TextTask
from cortex_core.tasks.mixture import build_task
from cortex_core.tasks.vocabulary import IntArray, TaskVocabulary
from cortex_core.training.pretrain_config import PretrainConfig

Kind = Literal["text", "key_value", "repeat", "copy_reverse", "n_back", "long_addition"]
KINDS: tuple[Kind, ...] = ("text", "key_value", "repeat", "copy_reverse", "n_back", "long_addition")
_FILLERS = ("text", "random")
_EARLY_TEXT = 0.25  # share of the plain text that the early steps keep
_EARLY_REPEAT = 0.35  # repeats among the rows that the early steps put in its place


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
    _tasks: dict[tuple[str, str, int], TextTask] = field(default_factory=dict, repr=False)

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
        text = 1.0 - rows.task_frac
        shares = np.array(
            [
                text,
                rows.key_value_frac,
                rows.repeat_frac,
                rows.copy_reverse_frac,
                rows.n_back_frac,
                rows.long_addition_frac,
            ]
        )
        if step < rows.early_steps:
            moved = text * (1.0 - _EARLY_TEXT)
            shares[:3] += [-moved, moved * (1.0 - _EARLY_REPEAT), moved * _EARLY_REPEAT]
        shares = np.maximum(shares, 0.0)
        return shares / shares.sum()

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
                filler = _FILLERS[int(rng.integers(2))]
                queries = int(rng.integers(1, 9)) if kind == "n_back" else 1
                example = self._task(kind, filler).in_window_example(index, window, num_queries=queries)
                return self._weighted(example, filler, answered=True)

    def _key_value(self, rng: np.random.Generator, index: int, window: int, early: bool) -> tuple[IntArray, NDArray, NDArray]:
        rows = self.config.rows
        filler = _FILLERS[int(rng.integers(2))]
        pairs = 6 if rng.random() < 2 / 3 else int(rng.integers(2, rows.max_pairs + 1))
        most = min(rows.many_queries, (window - 1) // 4 - pairs)
        queries = most if early else int(rng.integers(1, most + 1))
        answered = rng.random() >= rows.no_facts_frac
        example = self._task("key_value", filler, pairs).in_window_example(
            index, window, num_queries=queries, with_facts=answered
        )
        return self._weighted(example, filler, answered=answered)

    def _repeat(self, rng: np.random.Generator, index: int, window: int) -> tuple[IntArray, NDArray, NDArray]:
        period = int(rng.integers(8, window // 3))
        if rng.random() < 0.5:
            run = self.corpus.excerpt((self.config.seed, 14, index), period, "train")
        else:
            usable = np.setdiff1d(self.vocabulary.random_ids, self.vocabulary.held_out_words(), assume_unique=True)
            run = rng.choice(usable, period)
        again = np.arange(window) > period
        return np.resize(run, window), np.zeros(window), self.config.repeat_weight * again

    def _weighted(self, example: Example, filler: str, *, answered: bool) -> tuple[IntArray, NDArray, NDArray]:
        """Answers count as answers, or not at all where the facts are missing; the rest as text."""
        weight = 1.0 if filler == "text" else self.config.random_weight
        return example.tokens, weight * ~example.answer, 1.0 * example.answer * answered

    def _task(self, name: Kind, filler: str, pairs: int = 6) -> TextTask:
        key = (name, filler, pairs)
        if key not in self._tasks:
            assert name != "text" and name != "repeat"
            self._tasks[key] = build_task(
                name, filler, self.vocabulary, self.corpus, seed=self.config.seed, num_pairs=pairs
            )
        return self._tasks[key]
