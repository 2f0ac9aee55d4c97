"""How the Triton kernel is cut up: by precision and padded rank.

Results do not depend on it: speed does and, by the chunk, how many states are kept. Found fastest on an NVIDIA H200 by
`tests/benchmarks/tune_kernel.py` (batch 8, 8 heads, 2,048 tokens, dimension 64), but for "ieee", which it does not try,
and for `errors`, which were timed with loads that are slower than today's.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Precision = Literal["ieee", "tf32x3", "tf32"]


class Cut(NamedTuple):
    """For each pass, warps per program and, at most, columns per tile."""

    chunk: int
    """Tokens at a time."""
    prepare: tuple[int, int]
    prepare_backward: tuple[int, int]
    carry: tuple[int, int]
    carry_backward: tuple[int, int]
    read: tuple[int, int]
    gradients: tuple[int, int]
    errors: tuple[int, int] | None = None
    """None where `gradients` finds them itself, which is less to write and to read, but takes more registers."""


TABLE: dict[tuple[Precision, int], Cut] = {
    ("ieee", 16): Cut(32, (2, 32), (2, 32), (4, 32), (4, 32), (4, 32), (2, 32)),
    ("ieee", 32): Cut(32, (4, 32), (4, 32), (4, 32), (4, 32), (4, 32), (4, 32)),
    ("ieee", 64): Cut(32, (4, 32), (4, 32), (8, 32), (8, 32), (4, 32), (4, 32), (2, 32)),
    ("ieee", 128): Cut(32, (8, 32), (8, 32), (8, 32), (8, 32), (8, 32), (8, 32), (8, 32)),
    ("tf32x3", 16): Cut(16, (1, 32), (1, 32), (4, 32), (4, 32), (2, 64), (1, 32)),
    ("tf32x3", 32): Cut(32, (2, 32), (2, 32), (4, 32), (4, 32), (1, 64), (4, 32), (2, 32)),
    ("tf32x3", 64): Cut(32, (2, 32), (2, 32), (4, 32), (4, 16), (2, 64), (4, 32), (2, 32)),
    ("tf32x3", 128): Cut(32, (4, 32), (4, 32), (8, 32), (8, 32), (4, 64), (4, 32), (4, 32)),
    ("tf32", 16): Cut(32, (1, 64), (1, 64), (4, 32), (4, 32), (2, 64), (2, 32)),
    ("tf32", 32): Cut(32, (1, 64), (1, 64), (2, 16), (4, 16), (2, 64), (2, 32)),
    ("tf32", 64): Cut(32, (2, 32), (2, 32), (8, 32), (4, 32), (8, 64), (2, 32), (2, 32)),
    ("tf32", 128): Cut(64, (4, 32), (4, 32), (8, 32), (8, 32), (8, 64), (8, 32), (4, 32)),
}
