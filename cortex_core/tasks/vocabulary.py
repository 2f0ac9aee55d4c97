"""Words and markers that a tokenizer writes as single tokens, split into pools that never meet.

Keys never are values, and a word that evaluation asks about never occurs in a training task: a model that
answers must have read the fact, it cannot have learned the word's role by heart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cortex_core.errors import DataError

Split = Literal["train", "validation", "held_out"]
IntArray = NDArray[np.int64]

HINTS = tuple(f" {letter}" for letter in "abcdefghijklmnopqrstuvwxyzABCDEFG")
"""Names of 33 positions, for tasks that say where a thing stands instead of letting the reader count."""
MARKERS = (
    " remember", " recall", " items", " item", " digits", " reverse", " add", " plus", " sum", " pairs", " pair",
    " let", " copy", " value", " went", " got", " put", " gave", " north", " south", " east", " west", " where",
    " find", " before", " above", " below", " left", " right", " giver", " given", " receiver", ";", *HINTS,
)  # fmt: skip
"""Strings with a fixed role in the task lines, each with the space that it is written with."""
DIGITS = tuple(f" {digit}" for digit in range(10))

POOL_SEED = 20_250_101
"""Default seed of the pools, not a run's seed: every run on a tokenizer must hold out the same words."""
HELD_OUT_FRAC = 1 / 3
VALIDATION_FRAC = 1 / 5
"""Of the words for training, where some are set aside to validate on."""
FREQUENT_FRAC = 0.2
MAX_WORDS = 1200
MIN_WORDS = 24

_WORD = re.compile(r"[a-z]{3,12}")
_SPACE_MARKS = (
    "\u0120",
    "\u2581",
    " ",
)  # how byte-level and sentencepiece vocabularies write a leading space


@dataclass(frozen=True)
class TaskVocabulary:
    """What tasks write with. Build it with `from_tokenizer`; token ids throughout."""

    tokenizer: Any = field(repr=False)
    prefix: tuple[int, ...]
    """What a document opens with: the beginning-of-sequence token, or nothing where there is none."""
    separator: tuple[int, ...]
    """What stands between two documents: the end-of-sequence token, or nothing."""
    keys: MappingProxyType[Split, IntArray] = field(repr=False)
    """One-token words by split, int64 [n]; "validation" only where words were set aside for it."""
    values: MappingProxyType[Split, IntArray] = field(repr=False)
    """One-token words by split, int64 [n]; disjoint from the keys."""
    pieces: MappingProxyType[str, tuple[int, ...]] = field(repr=False)
    """Ids of every marker, hints among them, and of the digits " 0" to " 9" (several ids where the tokenizer splits
    them)."""
    random_ids: IntArray = field(repr=False)
    """What random filler is drawn from: the vocabulary without special tokens and markers, int64 [n]."""

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, seed: int = POOL_SEED, *, validation: bool = False) -> TaskVocabulary:
        """Take the pools from a tokenizer with the methods of a Hugging Face one.

        With `validation`, part of the words for training is set aside. The held-out words stay the same.

        Raises DataError when fewer than 24 words are single tokens with a leading space.
        """
        pieces = {text: tuple(tokenizer.encode(text, add_special_tokens=False)) for text in (*MARKERS, *DIGITS)}
        marker_ids = {token for text in MARKERS for token in pieces[text]}
        digit_ids = {token for text in DIGITS for token in pieces[text]}
        words = _single_token_words(tokenizer, excluded=marker_ids | digit_ids)
        # Byte-pair vocabularies number frequent words first. Real text is full of those: they would distract.
        words = words[int(len(words) * FREQUENT_FRAC) :][:MAX_WORDS]
        if len(words) < MIN_WORDS:
            raise DataError(
                f"the tokenizer writes only {len(words)} suitable words (lower-case ascii, 3 to 12 letters, "
                f"one token with its leading space), at least {MIN_WORDS} are needed: choose another backbone"
            )
        order = np.random.default_rng(seed).permutation(np.array(words, dtype=np.int64))
        keys, values = (_pools(half, validation) for half in np.split(order, [len(order) // 2]))
        special = set(tokenizer.all_special_ids)
        random_ids = sorted(set(tokenizer.get_vocab().values()) - special - marker_ids)
        return cls(
            tokenizer=tokenizer,
            prefix=_present(tokenizer.bos_token_id),
            separator=_present(tokenizer.eos_token_id),
            keys=keys,
            values=values,
            pieces=MappingProxyType(pieces),
            random_ids=np.array(random_ids, dtype=np.int64),
        )

    def digits(self, numbers: Sequence[int] | IntArray) -> list[int]:
        """Ids of " d" for each digit d in `numbers`."""
        return [token for number in numbers for token in self.pieces[DIGITS[int(number)]]]

    def hinted(self, positions: Iterable[int], numbers: Iterable[int]) -> list[int]:
        """Ids of " a 4 b 0 ...": each digit of `numbers` after the hint that names its position (0 is " a").

        Both of the same length; positions lie in 0 to 32.
        """
        return [
            token
            for position, number in zip(positions, numbers, strict=True)
            for token in (*self.pieces[HINTS[int(position)]], *self.pieces[DIGITS[int(number)]])
        ]

    @cached_property
    def shared_ids(self) -> IntArray:
        """Every id that training may use for anything: `random_ids` without the words below, int64 [n]."""
        return np.setdiff1d(self.random_ids, self.held_out_words(), assume_unique=True)

    def held_out_words(self) -> IntArray:
        """Every word that no training task may use, int64 [n]: those for validation as well."""
        return np.concatenate([p[split] for p in (self.keys, self.values) for split in p if split != "train"])


def _single_token_words(tokenizer: Any, excluded: set[int]) -> list[int]:
    """Ids of suitable words in the order of their ids; every candidate is verified by encoding it."""
    candidates: dict[str, int] = {}
    for token, index in tokenizer.get_vocab().items():
        word = token[1:] if token.startswith(_SPACE_MARKS) else token
        if _WORD.fullmatch(word) and index not in excluded:
            candidates[word] = index
    if not candidates:
        return []
    encoded = tokenizer([f" {word}" for word in candidates], add_special_tokens=False)["input_ids"]
    return sorted({ids[0] for ids in encoded if len(ids) == 1 and ids[0] not in excluded})


def _pools(words: IntArray, validation: bool) -> MappingProxyType[Split, IntArray]:
    """Split shuffled words into the train and the held-out pool, and one to validate on between them."""
    cut = len(words) - round(len(words) * HELD_OUT_FRAC)
    if not validation:
        return MappingProxyType({"train": words[:cut], "held_out": words[cut:]})
    first = cut - round(cut * VALIDATION_FRAC)
    return MappingProxyType({"train": words[:first], "validation": words[first:cut], "held_out": words[cut:]})


def _present(token: int | None) -> tuple[int, ...]:
    return () if token is None else (token,)
