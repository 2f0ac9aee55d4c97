"""Sets of n-grams of bounded size, by hashes: what has been read or dreamed before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cortex_core.errors import ConfigError

Hashes = NDArray[np.uint64]
_ODD = np.uint64(0x9E3779B97F4A7C15)  # of multiplications by it, no two tokens have the same result
_MIX = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))


def ngrams(tokens: Sequence[int] | NDArray[np.integer], count: int) -> Hashes:
    """Hash of each run of `count` tokens, each once, in order; fewer tokens than that are one run. Of none, none."""
    ids = np.asarray(tokens, dtype=np.uint64)
    if not len(ids):
        return ids
    width = min(count, len(ids))
    found = np.full(len(ids) - width + 1, width, dtype=np.uint64)
    for at in range(width):
        found = _mixed(found * _ODD + ids[at : at + len(found)])
    return np.unique(found)


def _mixed(x: Hashes) -> Hashes:
    """Every bit of the result depends on every bit (the finaliser of SplitMix64)."""
    for shift, factor in _MIX:
        x = (x ^ (x >> shift)) * factor
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True, eq=False)
class NgramSet:
    """A bit per hash value: nothing that is in it is missed, and what is not passes for known by chance `fill`."""

    count: int
    """Tokens of an n-gram."""
    bits: NDArray[np.uint8]
    """Eight of them each."""

    @classmethod
    def empty(cls, count: int, set_bits: int) -> NgramSet:
        """For n-grams of `count` tokens, with 2^set_bits bits."""
        if count < 1 or set_bits < 3:
            raise ConfigError(f"an n-gram set of {count} tokens and 2^{set_bits} bits: at least 1 token, at least 2^3")
        return cls(count, np.zeros(1 << (set_bits - 3), dtype=np.uint8))

    @property
    def fill(self) -> float:
        """Share of the bits that are set."""
        return float(np.bitwise_count(self.bits).sum()) / (8 * len(self.bits))

    def with_rows(self, rows: Iterable[Sequence[int] | NDArray[np.integer]]) -> NgramSet:
        """Also with all n-grams of these rows of tokens."""
        bits = self.bits.copy()
        for row in rows:
            at, bit = self._places(ngrams(row, self.count))
            np.bitwise_or.at(bits, at, bit)
        return replace(self, bits=bits)

    def novelty(self, tokens: Sequence[int]) -> float:
        """Share of the n-grams of `tokens` that are not in it; 1 for no tokens. What passes for known by chance is
        accounted for: without bias as long as the set is not full, when nothing is new."""
        found = ngrams(tokens, self.count)
        if not len(found):
            return 1.0
        at, bit = self._places(found)
        unseen = float((self.bits[at] & bit == 0).mean())
        return min(1.0, unseen / (1 - self.fill)) if unseen else 0.0

    def _places(self, hashes: Hashes) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        place = hashes % np.uint64(8 * len(self.bits))
        bit = np.left_shift(np.uint8(1), (place % np.uint64(8)).astype(np.uint8))
        return (place // np.uint64(8)).astype(np.int64), bit
