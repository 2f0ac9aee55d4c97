"""Multi-query associative recall in bare token ids, after its definition by Arora et al. 2023.

"Zoology: Measuring and Improving Recall in Efficient Language Models". Half of the vocabulary are keys, the other half
values, and id 0 is a blank. A sequence opens with key-value pairs, keys and values in turn, all keys and all values
distinct. The rest is made of slots of two tokens: every key comes back once, at the start of a slot of its own, and the
model must say there which value the key had. The value itself is never shown again. Slots are drawn without replacement
with a probability that falls as a power law from the end of the pairs on: slot i = 1, 2, ... weighs i^(power_a - 1), so
`power_a` 1 is uniform and the usual 0.01 puts most questions close. What is neither pair nor question is blank, or
random ids in the harder form.

In the forgetting form, some of the keys are told again after all pairs, each with another value, and that is the
answer. (The reference code may draw the old value again; here the two differ.)

Sizes, all with a vocabulary of 8,192. `TRAIN` and `TEST` are those of Arora et al. 2024, "Simple linear attention
language models balance the recall-throughput tradeoff", figure 2, one model for all of them:

    train  100,000 x (64 tokens, 4 pairs), and 20,000 each of (128, 8), (256, 16), (256, 32), (256, 64)
    test   1,000 each of (64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256)

`FIGURE_2` holds the sizes of the first paper, each a run of its own with 100,000 sequences to train on, 3,000 to test,
and blanks: (64, 4), (128, 8), (256, 16), (512, 64). `FORGETTING_TRAIN` and `FORGETTING_TEST` are the sizes of the
forgetting form in the reference code, with four updates in every sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cortex_core.errors import ConfigError
from cortex_core.tasks.layout import SPLIT_CODES
from cortex_core.tasks.vocabulary import IntArray, Split

VOCAB_SIZE = 8192
BLANK = 0
_STREAM = 8


class RecallBatch(NamedTuple):
    """N sequences of T tokens."""

    tokens: IntArray
    """int64 [N, T]"""
    asked: NDArray[np.bool_]
    """bool [N, T], True at the keys that are questions: what is predicted *after* that token counts. Other than in
    `layout.Example`, the answer is not among the tokens."""
    expected: IntArray
    """The value to predict after each question, -1 elsewhere, int64 [N, T]."""


@dataclass(frozen=True)
class Mqar:
    """Sequences of one size; sequence `index` depends on (seed, split, index) and the size alone."""

    num_tokens: int
    num_pairs: int
    num_updates: int = 0
    """Keys that are told again with another value; 0 is the plain form."""
    vocab_size: int = VOCAB_SIZE
    power_a: float = 0.01
    random_non_queries: bool = True
    """Whether random ids, keys and values among them, stand in place of the blanks."""

    def __post_init__(self) -> None:
        """Raises ConfigError when the sequence is odd or too short, or the vocabulary or a number is out of bounds."""
        if self.num_pairs < 1 or not 0 <= self.num_updates <= self.num_pairs:
            raise ConfigError(
                f"num_pairs = {self.num_pairs} must be at least 1, num_updates = {self.num_updates} in 0 to num_pairs"
            )
        needed = self.context_tokens + 2 * self.num_pairs
        if self.num_tokens % 2 or self.num_tokens < needed:
            raise ConfigError(
                f"num_tokens = {self.num_tokens} must be even and at least {needed} for {self.num_pairs} pairs and "
                f"{self.num_updates} updates, each pair asked once"
            )
        least = max(2 * (self.num_pairs + 1), 4)
        if self.vocab_size < least:
            raise ConfigError(f"vocab_size = {self.vocab_size} must be at least {least} for {self.num_pairs} pairs")
        if self.power_a <= 0:
            raise ConfigError(f"power_a = {self.power_a} must be above 0; 1 asks anywhere with equal probability")

    @property
    def context_tokens(self) -> int:
        """Tokens of the pairs and the updates, which every sequence opens with."""
        return 2 * (self.num_pairs + self.num_updates)

    def chance(self) -> float:
        """Share of answers that a guess gets right: any of the values."""
        return 1 / (self.vocab_size - self.vocab_size // 2)

    def slot_probabilities(self) -> NDArray[np.float64]:
        """Probability that the first question drawn stands in each slot, in order; sums to 1, [slots]."""
        slots = np.arange(1, (self.num_tokens - self.context_tokens) // 2 + 1, dtype=np.float64)
        weights = slots ** (self.power_a - 1)
        return weights / weights.sum()

    def batch(self, indices: Sequence[int], *, split: Split = "train", seed: int = 0) -> RecallBatch:
        """The sequences `indices`, one row each."""
        tokens = np.full((len(indices), self.num_tokens), BLANK, np.int64)
        expected = np.full_like(tokens, -1)
        probabilities = self.slot_probabilities()
        for row, index in enumerate(indices):
            rng = np.random.default_rng([seed, SPLIT_CODES[split], index, _STREAM])
            self._write(rng, probabilities, tokens[row], expected[row])
        return RecallBatch(tokens, expected >= 0, expected)

    def _write(
        self, rng: np.random.Generator, probabilities: NDArray[np.float64], tokens: IntArray, expected: IntArray
    ) -> None:
        """Fill one row: tokens and expected values, both [T], from the probabilities of the slots."""
        first_value, context = self.vocab_size // 2, self.context_tokens
        num_values = self.vocab_size - first_value
        keys = 1 + rng.choice(first_value - 1, self.num_pairs, replace=False)
        values = first_value + rng.choice(num_values, self.num_pairs, replace=False)
        again = rng.choice(self.num_pairs, self.num_updates, replace=False)
        tokens[:context:2] = np.concatenate([keys, keys[again]])
        told = values.copy()
        # A step around the circle of values that is not a whole turn never ends at the old one.
        steps = rng.integers(1, num_values, self.num_updates)
        values[again] = first_value + (values[again] - first_value + steps) % num_values
        tokens[1:context:2] = np.concatenate([told, values[again]])
        slots = rng.choice(len(probabilities), self.num_pairs, replace=False, p=probabilities)
        at = context + 2 * slots
        if self.random_non_queries:
            tokens[context:] = rng.integers(0, self.vocab_size, self.num_tokens - context)
        tokens[at] = keys
        expected[at] = values


class Portion(NamedTuple):
    """So many sequences of one size."""

    task: Mqar
    num_sequences: int


def _portions(num_updates: int, sizes: Sequence[tuple[int, int, int]]) -> tuple[Portion, ...]:
    return tuple(Portion(Mqar(tokens, pairs, num_updates), count) for count, tokens, pairs in sizes)


TRAIN = _portions(0, [(100_000, 64, 4), (20_000, 128, 8), (20_000, 256, 16), (20_000, 256, 32), (20_000, 256, 64)])
TEST = _portions(
    0,
    [
        (1000, 64, 4),
        (1000, 64, 8),
        (1000, 64, 16),
        (1000, 128, 32),
        (1000, 256, 64),
        (1000, 512, 128),
        (1000, 1024, 256),
    ],
)
FORGETTING_TRAIN = _portions(
    4, [(100_000, 64, 4), (20_000, 128, 9), (20_000, 256, 16), (20_000, 256, 25), (20_000, 256, 36)]
)
FORGETTING_TEST = _portions(
    4,
    [
        (1000, 64, 4),
        (1000, 64, 9),
        (1000, 128, 16),
        (1000, 256, 36),
        (1000, 512, 64),
        (1000, 1024, 144),
        (1000, 2048, 256),
    ],
)
FIGURE_2 = tuple(
    Mqar(tokens, pairs, random_non_queries=False) for tokens, pairs in ((64, 4), (128, 8), (256, 16), (512, 64))
)
FIGURE_2_SEQUENCES: dict[Split, int] = {"train": 100_000, "held_out": 3_000}
