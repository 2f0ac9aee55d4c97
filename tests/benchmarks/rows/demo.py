"""The finished demo run that most rows measure: its settings, its trained model, its tasks. Loaded when asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cortex_core.config import TaskName
from cortex_core.errors import DataError
from pipelines.config import CONFIG_FILE, SIDECARS_FOLDER, RunConfig, load_config

if TYPE_CHECKING:  # the rows are listed, and a wrong name is answered, before torch is imported
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from cortex_core.backbone.model import Cortex
    from cortex_core.eval.suite import Suite
    from cortex_core.tasks.corpus import Corpus
    from cortex_core.tasks.layout import TextTask
    from cortex_core.tasks.vocabulary import TaskVocabulary

FILLERS = ("text", "random")
SEED = 20_001
"""Of everything that is drawn here. Not the run's own: its report and the scoreboard ask different questions."""


@dataclass(frozen=True)
class Answers:
    """Results of the same examples with and without memory, at one gap."""

    with_memory: tuple[bool, ...]
    bare: tuple[bool, ...]
    seconds: float


@dataclass
class Demo:
    """A run's folder, as `cortex train` leaves it."""

    folder: Path
    answers: dict[tuple[str, int], Answers] = field(default_factory=dict)
    """By filler and gap: what the recall rows have measured in this session, so that others need not ask again."""

    def check(self) -> None:
        """Raises DataError, with the remedy, unless the run is there and finished."""
        from pipelines.runs import STATE_FILE

        remedy = "run `make demo` first, or name another run's folder with --run"
        state = self.folder / STATE_FILE
        if not state.is_file():
            raise DataError(f"{self.folder} holds no run: {remedy}")
        try:
            finished = json.loads(state.read_text())["state"] == "FINISHED"
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{state} is damaged: {remedy}") from None
        if not finished or not self.sidecars.is_dir():
            raise DataError(f"{self.folder} is not finished: {remedy}")

    @property
    def sidecars(self) -> Path:
        """Folder of the trained memory."""
        return self.folder / SIDECARS_FOLDER

    @cached_property
    def config(self) -> RunConfig:
        """The run's resolved settings."""
        return load_config(self.folder / CONFIG_FILE)

    @cached_property
    def model(self) -> Cortex:
        """The trained model, loaded as a user loads it."""
        from transformers.utils import logging

        from cortex_core.backbone.model import Cortex

        logging.disable_progress_bar()
        settings = self.config.backbone.model_dump(exclude={"name"})
        return Cortex.from_pretrained(self.config.backbone.name, self.sidecars, **settings).eval()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The backbone's."""
        from cortex_core.backbone.load import load_tokenizer

        return load_tokenizer(self.config.backbone)

    @cached_property
    def vocabulary(self) -> TaskVocabulary:
        """The words of the tasks."""
        from cortex_core.tasks.vocabulary import TaskVocabulary

        return TaskVocabulary.from_tokenizer(self.tokenizer)

    @cached_property
    def corpus(self) -> Corpus:
        """The run's text."""
        from cortex_core.tasks.corpus import load_corpus

        return load_corpus(self.config.data, self.tokenizer)

    def task(self, filler: str, name: TaskName = "key_value") -> TextTask:
        """A task over words and text that training never saw."""
        from cortex_core.tasks.mixture import build_task

        return build_task(
            name, filler, self.vocabulary, self.corpus,
            split="held_out", seed=SEED, num_pairs=self.config.tasks.num_pairs,
        )  # fmt: skip

    def suite(self, **settings: Any) -> Suite:
        """The product's evaluation with the run's settings but these (fields of `EvaluationConfig`)."""
        from cortex_core.eval.suite import Suite

        config = self.config.evaluation.model_copy(update=settings)
        return Suite(config, self.vocabulary, self.corpus, self.config.tasks.num_pairs, SEED)

    def excerpts(self, rows: int, tokens: int) -> np.ndarray:
        """Held-out text, int64 [rows, tokens]."""
        import numpy as np

        return np.stack([self.corpus.excerpt((SEED, row), tokens, "held_out") for row in range(rows)])


def batches(indices: Sequence[int], size: int) -> list[Sequence[int]]:
    """`indices` in groups of at most `size`."""
    return [indices[first : first + size] for first in range(0, len(indices), size)]
