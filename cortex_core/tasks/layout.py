"""Where the parts of an example go: facts, filler and questions, laid out to an exact number of tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cortex_core.errors import ConfigError
from cortex_core.tasks.filler import Filler
from cortex_core.tasks.vocabulary import IntArray, Split, TaskVocabulary

SPLIT_CODES = {"train": 0, "held_out": 1}


class Example(NamedTuple):
    """One sequence."""

    tokens: IntArray
    """int64 [T]"""
    answer: NDArray[np.bool_]
    """bool [T], True at the tokens that must be predicted (the token itself, not the position before it)."""


class Part(NamedTuple):
    """A run of tokens that stays together: one fact, or one question with its answer."""

    tokens: list[int]
    answer_from: int = -1
    """Position of the first answer token; -1 where nothing is asked."""
    answer_to: int = -1
    """Position after the last answer token."""


class Sheet(NamedTuple):
    """The content of one example, before it is laid out."""

    facts: list[Part]
    queries: list[Part]


@dataclass(frozen=True)
class TextTask(ABC):
    """Facts and questions as tokens. A task says what they are; where they stand is said here, once for all.

    The content of an example depends on (seed, split, index) alone: different gaps ask about the same facts.
    """

    name: ClassVar[str]

    vocabulary: TaskVocabulary
    filler: Filler
    split: Split = "train"
    seed: int = 0

    @abstractmethod
    def sheet(self, index: int, num_queries: int) -> Sheet:
        """Facts and questions of example `index`."""

    def rng(self, index: int, *stream: int) -> np.random.Generator:
        """Random numbers of example `index`; another `stream` is independent of the first."""
        return np.random.default_rng([self.seed, SPLIT_CODES[self.split], index, *stream])

    def example(self, index: int, gap_tokens: int, *, num_queries: int = 1) -> Example:
        """Document prefix, facts, exactly `gap_tokens` of filler, questions."""
        if gap_tokens < 0:
            raise ConfigError(f"gap_tokens = {gap_tokens} must be at least 0")
        sheet = self.sheet(index, num_queries)
        filler = self.filler.tokens((self.seed, SPLIT_CODES[self.split], index), gap_tokens)
        return join([self._prefix(), *sheet.facts, filler, *sheet.queries])

    def overhead_tokens(self, index: int, *, num_queries: int = 1) -> int:
        """Tokens of `example` that are not filler."""
        sheet = self.sheet(index, num_queries)
        return len(self._prefix()) + _length(sheet.facts) + _length(sheet.queries)

    def query_tokens(self, index: int, *, num_queries: int = 1) -> int:
        """Tokens of the questions, with their answers: what `example` ends with."""
        return _length(self.sheet(index, num_queries).queries)

    def spanning_example(
        self, index: int, total_tokens: int, *, num_queries: int = 1, segment_tokens: int = 1
    ) -> Example:
        """Exactly `total_tokens`: filler, facts, filler, questions, filler.

        Facts lie anywhere in the first `segment_tokens`, questions anywhere in the last, as far as they fit:
        neither may be told by its position. A third of the examples opens with the document prefix and its
        facts at once. Raises ConfigError when facts and questions do not fit at all.
        """
        sheet = self.sheet(index, num_queries)
        rng = self.rng(index, 1)
        opens = rng.random() < 1 / 3
        prefix = self._prefix() if opens else np.zeros(0, np.int64)
        told, asked = _length(sheet.facts), _length(sheet.queries)
        room = total_tokens - len(prefix) - told - asked
        if room < 0:
            raise ConfigError(self._too_short(total_tokens, total_tokens - room))
        before = 0 if opens else int(rng.integers(0, max(min(segment_tokens - told, room), 0) + 1))
        after = int(rng.integers(0, max(min(segment_tokens - asked, room - before), 0) + 1))
        filler = self.filler.tokens((self.seed, SPLIT_CODES[self.split], index), room)
        gap_end = room - after
        return join([prefix, filler[:before], *sheet.facts, filler[before:gap_end], *sheet.queries, filler[gap_end:]])

    def in_window_example(
        self, index: int, total_tokens: int, *, num_queries: int = 1, with_facts: bool = True
    ) -> Example:
        """Exactly `total_tokens` with facts and questions anywhere inside, filler before, between and after.

        A third of the rows opens with the document prefix, the others in the middle of the filler.
        `with_facts=False` puts filler in the place of the facts: the questions cannot be answered, the
        answer mask still says where they are. Raises ConfigError when facts and questions do not fit.
        """
        sheet = self.sheet(index, num_queries)
        rng = self.rng(index, 2)
        facts = sheet.facts if with_facts else []
        parts = [*facts, *sheet.queries]
        prefix = self._prefix() if rng.random() < 1 / 3 else np.zeros(0, np.int64)
        room = total_tokens - len(prefix) - _length(parts)
        if room < 0:
            raise ConfigError(self._too_short(total_tokens, total_tokens - room))
        filler = self.filler.tokens((self.seed, SPLIT_CODES[self.split], index), room)
        cuts = _cuts(rng, room, len(facts), len(sheet.queries))
        pieces: list[Part | IntArray] = [prefix, filler[: cuts[0]]]
        for part, start, end in zip(parts, cuts[:-1], cuts[1:], strict=True):
            pieces += [part, filler[start:end]]
        return join(pieces)

    def _prefix(self) -> IntArray:
        return np.array(self.vocabulary.prefix, dtype=np.int64)

    def _too_short(self, got: int, needed: int) -> str:
        return (
            f"total_tokens = {got} is too short for {self.name}, whose facts and questions take {needed}: "
            "lengthen the sequence, or ask for fewer pairs or queries"
        )


def join(pieces: list[Part | IntArray]) -> Example:
    """Concatenate parts and filler; answers are marked where the parts say."""
    total = sum(len(piece.tokens) if isinstance(piece, Part) else len(piece) for piece in pieces)
    tokens, answer = np.empty(total, np.int64), np.zeros(total, np.bool_)
    at = 0
    for piece in pieces:
        run = piece.tokens if isinstance(piece, Part) else piece
        tokens[at : at + len(run)] = run
        if isinstance(piece, Part) and piece.answer_from >= 0:
            answer[at + piece.answer_from : at + piece.answer_to] = True
        at += len(run)
    return Example(tokens, answer)


def _length(parts: list[Part]) -> int:
    return sum(len(part.tokens) for part in parts)


def _cuts(rng: np.random.Generator, room: int, num_facts: int, num_queries: int) -> IntArray:
    """Filler position at which each part is inserted, ascending, then `room`: int64 [facts + queries + 1].

    Half of the time the facts stand together, and so do the questions; otherwise they are strewn about.
    """
    together_facts, together_queries = rng.random(2) < 0.5
    split = int(rng.integers(0, room + 1))
    facts = np.full(num_facts, rng.integers(0, split + 1)) if together_facts else rng.integers(0, split + 1, num_facts)
    if together_queries:
        queries = np.full(num_queries, rng.integers(split, room + 1))
    else:
        queries = rng.integers(split, room + 1, num_queries)
    return np.concatenate([np.sort(facts), np.sort(queries), [room]]).astype(np.int64)
