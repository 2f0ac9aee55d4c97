"""Where the parts of an example go: facts, filler and questions, laid out to an exact number of tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cortex_core.errors import ConfigError
from cortex_core.tasks.filler import Filler
from cortex_core.tasks.vocabulary import IntArray, Split, TaskVocabulary

SPLIT_CODES = {"train": 0, "held_out": 1, "validation": 2}
_POOL_STREAM = 4
_PLACE_STREAM = 5
CUT_FRAC = 0.25
"""Share of training examples with a cut fact, and as many with a cut question."""


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
    scattered: ClassVar[bool] = False
    """Whether the facts stand about in the filler, in order, instead of all before it."""

    vocabulary: TaskVocabulary
    filler: Filler
    split: Split = "train"
    seed: int = 0
    any_token_frac: float = field(default=0.0, kw_only=True)
    """Share of examples whose words may be any token but held-out words: a small vocabulary has too few words to
    learn from them what a key is. Without effect on tasks whose facts hold no words."""

    @abstractmethod
    def sheet(self, index: int, num_queries: int) -> Sheet:
        """Facts and questions of example `index`."""

    def chance(self) -> float:
        """Share of examples (0 to 1) that a guess answers right.

        Where facts bind words that the task draws anew, a guess is any word of the pool of values. Where an example
        holds a few words of the kind that is asked for, a guess is one of those: such tasks say how many.
        """
        return 1 / len(self.vocabulary.values[self.split])

    def rng(self, index: int, *stream: int) -> np.random.Generator:
        """Random numbers of example `index`; another `stream` is independent of the first."""
        return np.random.default_rng([self.seed, SPLIT_CODES[self.split], index, *stream])

    def pools(self, index: int) -> tuple[IntArray, IntArray]:
        """What example `index` draws its keys and its values from, int64 [n] each; any tokens in a share of them."""
        if self.any_token_frac and self.rng(index, _POOL_STREAM).random() < self.any_token_frac:
            return self.vocabulary.shared_ids, self.vocabulary.shared_ids
        return self.vocabulary.keys[self.split], self.vocabulary.values[self.split]

    def words(
        self, index: int, rng: np.random.Generator, num_keys: int, num_values: int
    ) -> tuple[list[int], list[int]]:
        """Keys and values for example `index`, every word of them another one."""
        key_pool, value_pool = self.pools(index)
        keys = rng.choice(key_pool, num_keys, replace=False)
        # The two pools may be one and the same: values that are keys already are passed over.
        drawn = rng.choice(value_pool, min(num_keys + num_values, len(value_pool)), replace=False)
        values = drawn[~np.isin(drawn, keys)][:num_values]
        assert len(values) == num_values
        return keys.tolist(), values.tolist()

    def check_words(self, num_keys: int, num_values: int) -> None:
        """Raises ConfigError when the pools are too small for as many distinct keys and values."""
        for needed, pools, kind in (
            (num_keys, self.vocabulary.keys, "keys"), (num_values, self.vocabulary.values, "values"),
        ):  # fmt: skip
            if needed > len(pools[self.split]):
                raise ConfigError(
                    f"{self.name} needs {needed} {kind}, and this tokenizer offers {len(pools[self.split])} "
                    f"{self.split.replace('_', '-')} {kind}: ask for fewer"
                )

    def line(self, marker: str, words: Sequence[int], *, num_answers: int = 0) -> Part:
        """A marker, words and ";"; the last `num_answers` of the words are the answer."""
        tokens = [*self.vocabulary.pieces[marker], *words]
        end = len(tokens)
        asked = (end - num_answers, end) if num_answers else (-1, -1)
        return Part([*tokens, *self.vocabulary.pieces[";"]], *asked)

    def example(self, index: int, gap_tokens: int, *, num_queries: int = 1) -> Example:
        """Document prefix, facts, exactly `gap_tokens` of filler, questions; scattered facts stand in the filler."""
        if gap_tokens < 0:
            raise ConfigError(f"gap_tokens = {gap_tokens} must be at least 0")
        sheet = self.sheet(index, num_queries)
        filler = self.filler.tokens((self.seed, SPLIT_CODES[self.split], index), gap_tokens)
        return join([self._prefix(), *self._told(index, sheet.facts, filler), *sheet.queries])

    def _told(self, index: int, facts: list[Part], filler: IntArray, before: int = 0) -> list[Part | IntArray]:
        """Facts and all of `filler`, `before` tokens of it in front of facts that stand together."""
        if not self.scattered:
            return [filler[:before], *facts, filler[before:]]
        # The same share of the filler lies before a fact whatever its length is.
        places = np.sort(self.rng(index, _PLACE_STREAM).random(len(facts)))
        return _strewn(facts, filler, (places * (len(filler) + 1)).astype(np.int64))

    def overhead_tokens(self, index: int, *, num_queries: int = 1) -> int:
        """Tokens of `example` that are not filler."""
        sheet = self.sheet(index, num_queries)
        return len(self._prefix()) + _length(sheet.facts) + _length(sheet.queries)

    def max_overhead_tokens(self, *, num_queries: int = 1) -> int:
        """What `overhead_tokens` is at most, over all examples. Tasks whose examples differ in length say more."""
        return self.overhead_tokens(0, num_queries=num_queries)

    def query_tokens(self, index: int, *, num_queries: int = 1) -> int:
        """Tokens of the questions, with their answers: what `example` ends with."""
        return _length(self.sheet(index, num_queries).queries)

    def spanning_example(
        self, index: int, total_tokens: int, *, num_queries: int = 1, segment_tokens: int = 1
    ) -> Example:
        """Exactly `total_tokens`: filler, facts, filler, questions, filler.

        Facts lie anywhere in the first `segment_tokens`, questions anywhere in the last, as far as they fit: neither
        may be told by its position. In a share of the examples each (`CUT_FRAC`) the end of the first segment cuts a
        fact, the start of the last one the first question. Scattered facts lie anywhere before the questions. A third
        of the examples opens with the document prefix, and with its facts at once unless they are scattered. Raises
        ConfigError when facts and questions do not fit at all.
        """
        sheet = self.sheet(index, num_queries)
        rng = self.rng(index, 1)
        opens = rng.random() < 1 / 3
        prefix = self._prefix() if opens else np.zeros(0, np.int64)
        fact_tokens, asked = _length(sheet.facts), _length(sheet.queries)
        room = total_tokens - len(prefix) - fact_tokens - asked
        if room < 0:
            raise ConfigError(self._too_short(total_tokens, total_tokens - room))
        before = 0 if opens else int(rng.integers(0, max(min(segment_tokens - fact_tokens, room), 0) + 1))
        cut_fact, cut_question = rng.random(2) < CUT_FRAC
        if cut_fact and not opens and 0 <= (cut := segment_tokens - _inside(rng, sheet.facts)) <= room:
            before = cut
        after = int(rng.integers(0, max(min(segment_tokens - asked, room - before), 0) + 1))
        if cut_question and (start := sheet.queries[0].answer_from - 1) > 0:
            cut = segment_tokens - asked + int(rng.integers(1, start + 1))
            after = cut if 0 <= cut <= room - before else after
        filler = self.filler.tokens((self.seed, SPLIT_CODES[self.split], index), room)
        gap_end = room - after
        told = self._told(index, sheet.facts, filler[:gap_end], before)
        return join([prefix, *told, *sheet.queries, filler[gap_end:]])

    def in_window_example(
        self, index: int, total_tokens: int, *, num_queries: int = 1, with_facts: bool = True
    ) -> Example:
        """Exactly `total_tokens`: facts in order anywhere, then questions anywhere, filler before, between and after.

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
        return join([prefix, *_strewn(parts, filler, cuts)])

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


def rounds(rng: np.random.Generator, num_things: int, num_drawn: int) -> list[int]:
    """`num_drawn` of 0 ... `num_things` - 1 in random order: each once, then each again, as often as needed."""
    times = -(-num_drawn // num_things)
    return [int(thing) for _ in range(times) for thing in rng.permutation(num_things)][:num_drawn]


def _inside(rng: np.random.Generator, parts: list[Part]) -> int:
    """A place within one of the parts: tokens from the start of the first part."""
    chosen = int(rng.integers(len(parts)))
    return _length(parts[:chosen]) + int(rng.integers(1, len(parts[chosen].tokens)))


def _length(parts: list[Part]) -> int:
    return sum(len(part.tokens) for part in parts)


def _strewn(parts: list[Part], filler: IntArray, places: IntArray) -> list[Part | IntArray]:
    """All of the filler with each part at its place, ascending positions in the filler, int64 [parts]."""
    runs = np.split(filler, places)
    pieces: list[Part | IntArray] = [runs[0]]
    for part, run in zip(parts, runs[1:], strict=True):
        pieces += [part, run]
    return pieces


def _cuts(rng: np.random.Generator, room: int, num_facts: int, num_queries: int) -> IntArray:
    """Filler position at which each part is inserted, ascending: int64 [facts + queries].

    Half of the time the facts stand together, and so do the questions; otherwise they are strewn about.
    """
    together_facts, together_queries = rng.random(2) < 0.5
    split = int(rng.integers(0, room + 1))
    facts = np.full(num_facts, rng.integers(0, split + 1)) if together_facts else rng.integers(0, split + 1, num_facts)
    if together_queries:
        queries = np.full(num_queries, rng.integers(split, room + 1))
    else:
        queries = rng.integers(split, room + 1, num_queries)
    return np.concatenate([np.sort(facts), np.sort(queries)]).astype(np.int64)
