"""Which task comes next: a seeded draw over tasks and fillers, and batches of equal length."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from cortex_core.config import BackboneConfig, EvaluationConfig, SourceName, TaskName, TasksConfig, TrainingConfig
from cortex_core.errors import ConfigError
from cortex_core.tasks.copy_reverse import CopyReverse
from cortex_core.tasks.corpus import Corpus
from cortex_core.tasks.corpus_text import CorpusText
from cortex_core.tasks.digits import DigitTask
from cortex_core.tasks.filler import Filler, RandomFiller, TextFiller
from cortex_core.tasks.forgetting import Forgetting
from cortex_core.tasks.key_value import KeyValue
from cortex_core.tasks.layout import SPLIT_CODES, Example, TextTask
from cortex_core.tasks.long_addition import LongAddition, SplitAddition
from cortex_core.tasks.multi_query_recall import MultiQueryRecall
from cortex_core.tasks.n_back import NBack
from cortex_core.tasks.needle import MultiKeyNeedle, MultiQueryNeedle, MultiValueNeedle, Needle
from cortex_core.tasks.variable_tracking import VariableTracking
from cortex_core.tasks.vocabulary import IntArray, Split, TaskVocabulary
from cortex_core.tasks.world_tasks import WorldQA1, WorldQA2, WorldQA3, WorldQA4, WorldQA5

_DRAW = 3  # keeps the draw of a task apart from the draws inside it
_FILLER_STREAM = 13


_TASKS: dict[TaskName, type[TextTask]] = {
    "key_value": KeyValue,
    "copy_reverse": CopyReverse,
    "n_back": NBack,
    "long_addition": LongAddition,
    "multi_query_recall": MultiQueryRecall,
    "forgetting": Forgetting,
    "needle_single": Needle,
    "needle_multi_key": MultiKeyNeedle,
    "needle_multi_value": MultiValueNeedle,
    "needle_multi_query": MultiQueryNeedle,
    "variable_tracking": VariableTracking,
    "world_qa1": WorldQA1,
    "world_qa2": WorldQA2,
    "world_qa3": WorldQA3,
    "world_qa4": WorldQA4,
    "world_qa5": WorldQA5,
    "split_addition": SplitAddition,
}


def build_task(
    name: SourceName,
    filler: str,
    vocabulary: TaskVocabulary,
    corpus: Corpus,
    *,
    split: Split = "train",
    seed: int = 0,
    num_pairs: int = 6,
    any_token_frac: float = 0.0,
) -> TextTask:
    """One task with one filler. `num_pairs` is for tasks that are made of pairs; the others have sizes of their own.

    Raises ConfigError when the tokenizer has too few words for it.
    """
    hidden_in: Filler = TextFiller(corpus, split) if filler == "text" else RandomFiller(vocabulary)
    if name == "corpus":
        return CorpusText(vocabulary, TextFiller(corpus, split), split, seed)
    make = _TASKS[name]
    if issubclass(make, KeyValue | MultiQueryRecall):
        return make(vocabulary, hidden_in, split, seed, num_pairs, any_token_frac=any_token_frac)
    return make(vocabulary, hidden_in, split, seed, any_token_frac=any_token_frac)


@dataclass(frozen=True)
class Mixture:
    """Example `index` is drawn from a task that the index and the seed decide."""

    tasks: tuple[TextTask, ...]
    weights: tuple[float, ...]
    """Probability of each task, same length as `tasks`; sums to 1."""
    split: Split = "train"
    seed: int = 0

    @classmethod
    def from_config(
        cls,
        config: TasksConfig,
        vocabulary: TaskVocabulary,
        corpus: Corpus,
        *,
        split: Split = "train",
        seed: int = 0,
    ) -> Mixture:
        """Every task with every filler; tasks are equally likely, and so are the fillers of one task.

        `names` may hold "corpus" besides tasks: plain text, which in-window batches always hold some of.
        """
        tasks: list[TextTask] = []
        weights: list[float] = []
        for name in config.names:
            fillers = ("text",) if name == "corpus" else config.fillers
            for filler in fillers:
                tasks.append(
                    build_task(
                        name,
                        filler,
                        vocabulary,
                        corpus,
                        split=split,
                        seed=seed,
                        num_pairs=config.num_pairs,
                        any_token_frac=config.any_token_frac,
                    )
                )
                weights.append(1 / len(config.names) / len(fillers))
        return cls(tuple(tasks), tuple(weights), split, seed)

    @property
    def fillers(self) -> tuple[Filler, ...]:
        """What stands in gaps and is not itself to be remembered, one of each kind."""
        kept = {task.filler.name for task in self.tasks if isinstance(task, CorpusText)}
        found = {task.filler.name: task.filler for task in self.tasks}
        return tuple(filler for name, filler in found.items() if name not in kept)

    def filler_batch(self, indices: Sequence[int], total_tokens: int) -> IntArray:
        """Windows of filler, the kinds in turn, int64 [len(indices), total_tokens]; no rows where there is none."""
        fillers = self.fillers if indices else ()
        if not fillers:
            return np.zeros((0, total_tokens), np.int64)
        seeds = [(self.seed, index, _FILLER_STREAM) for index in indices]
        return np.stack([fillers[seed[1] % len(fillers)].tokens(seed, total_tokens) for seed in seeds])

    def task(self, index: int) -> TextTask:
        """The task of example `index`."""
        rng = np.random.default_rng([self.seed, SPLIT_CODES[self.split], index, _DRAW])
        return self.tasks[int(rng.choice(len(self.tasks), p=self.weights))]

    def fitting(self, tokens: int, *, num_queries: int = 1) -> Mixture:
        """The same draw, with numbers of as many digits as let facts and questions fit in `tokens`."""
        fitted = [
            task.fitting(tokens, num_queries=num_queries) if isinstance(task, DigitTask) else task
            for task in self.tasks
        ]
        return replace(self, tasks=tuple(fitted))

    def spanning_batch(
        self, indices: Sequence[int], total_tokens: int, *, num_queries: int = 1, segment_tokens: int = 1
    ) -> Example:
        """Long sequences, facts first, questions near the end. Both arrays [len(indices), total_tokens]."""
        return stack(
            [
                self.task(index).spanning_example(
                    index, total_tokens, num_queries=num_queries, segment_tokens=segment_tokens
                )
                for index in indices
            ]
        )

    def in_window_batch(self, indices: Sequence[int], total_tokens: int, *, num_queries: int = 1) -> Example:
        """Windows with everything inside. Both arrays [len(indices), total_tokens]."""
        return stack(
            [self.task(index).in_window_example(index, total_tokens, num_queries=num_queries) for index in indices]
        )


class TaskSettings(Protocol):
    """The settings of a run that decide which examples there are."""

    @property
    def backbone(self) -> BackboneConfig: ...
    @property
    def tasks(self) -> TasksConfig: ...
    @property
    def training(self) -> TrainingConfig: ...
    @property
    def evaluation(self) -> EvaluationConfig: ...


def check_tasks(config: TaskSettings, vocabulary: TaskVocabulary, corpus: Corpus) -> None:
    """Every example that a run will ask for can be made with this tokenizer. Raises ConfigError."""
    tasks = config.tasks
    asked: list[Split] = [split for split in vocabulary.keys if split != "train"]
    for split in asked:
        if tasks.num_pairs > (keys := len(vocabulary.keys[split])):
            purpose = (
                "held-out keys"
                if split == "held_out"
                else "keys to validate on (validation.every_steps = 0 needs none)"
            )
            raise ConfigError(
                f"tasks.num_pairs = {tasks.num_pairs}: must be at most {keys}, the words that the backbone's tokenizer "
                f"offers as {purpose}. Set tasks.num_pairs={keys} or less"
            )
    for name, split in itertools.product(config.evaluation.tasks, asked):
        try:
            build_task(name, "random", vocabulary, corpus, split=split, num_pairs=tasks.num_pairs)
        except ConfigError as error:
            raise ConfigError(f"evaluation.tasks: {name} cannot be asked with this tokenizer: {error}") from None
    windows = 1 if config.training.in_window_batch_size else 2
    room = windows * config.backbone.segment_tokens
    for task in Mixture.from_config(tasks, vocabulary, corpus).tasks:
        needed = task.max_overhead_tokens(num_queries=tasks.num_queries)
        if needed > room:
            raise ConfigError(
                f"tasks.num_queries = {tasks.num_queries} with tasks.num_pairs = {tasks.num_pairs}: facts and "
                f"questions of {task.name} take {needed} tokens, must be at most {room} ({windows} x "
                "backbone.segment_tokens). Lower tasks.num_queries or tasks.num_pairs, raise "
                f"backbone.segment_tokens, or leave {task.name} out of tasks.names"
            )


def stack(examples: Sequence[Example]) -> Example:
    """Rows [B, T] from examples of one length. Raises ConfigError when lengths differ."""
    lengths = {len(example.tokens) for example in examples}
    if len(lengths) != 1:
        raise ConfigError(f"examples of {len(lengths)} lengths cannot be one batch: {sorted(lengths)}")
    return Example(
        np.stack([example.tokens for example in examples]), np.stack([example.answer for example in examples])
    )
