"""What stands between facts and questions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np

from cortex_core.tasks.corpus import Corpus
from cortex_core.tasks.vocabulary import IntArray, Split, TaskVocabulary

_STREAM = 7  # keeps filler draws apart from the draws of the content


@runtime_checkable
class Filler(Protocol):
    """Exactly as many tokens as asked for, the same ones for the same seed."""

    name: ClassVar[str]

    def tokens(self, seed: tuple[int, ...], num_tokens: int) -> IntArray:
        """int64 [num_tokens]"""
        ...


@dataclass(frozen=True)
class TextFiller:
    """Real text of one split, from a random place; it continues file after file, however long the gap."""

    corpus: Corpus
    split: Split
    name: ClassVar[str] = "text"

    def tokens(self, seed: tuple[int, ...], num_tokens: int) -> IntArray:
        return self.corpus.excerpt((*seed, _STREAM), num_tokens, self.split)


@dataclass(frozen=True)
class RandomFiller:
    """Uniform random tokens, without special tokens and without the markers that give a fact away."""

    vocabulary: TaskVocabulary
    name: ClassVar[str] = "random"

    def tokens(self, seed: tuple[int, ...], num_tokens: int) -> IntArray:
        rng = np.random.default_rng([*seed, _STREAM])
        return rng.choice(self.vocabulary.random_ids, num_tokens)
