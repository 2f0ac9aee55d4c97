"""What a filter is that keeps tokens out of the memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class WriteFilter(Protocol):
    """Says which tokens must not be written. Attention still sees them, while their segment is open."""

    context_tokens: int
    """Tokens before a segment that it wants to see with it, at least 0."""

    def __call__(self, rows: Sequence[Sequence[int]], cut: Sequence[bool]) -> Sequence[Sequence[bool]]:
        """For every token id of every row, True where it must not be written. The same shape as `rows`.

        Where `cut`, the text may go on behind the row's end and the row will not be seen again with it: what could
        be the beginning of something must not be written either. Equal input has to give equal output.
        """
        ...
