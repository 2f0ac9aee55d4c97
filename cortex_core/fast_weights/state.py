"""The state of one layer's memory: a value that goes in and comes out, never an attribute of a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class FastWeights(NamedTuple):
    """What one layer remembers, float32. With the delta rule a read is `query @ up`; with the Hebbian rules the way
    into the key space moves as well, and a read is `query @ (slow + down) @ up`."""

    up: Float[Tensor, "batch heads rank head_dim"]
    """The values that the key space now holds (V in the source)."""
    down: Float[Tensor, "batch heads key_dim rank"] | None = None
    """What was added to the way into the key space (U in the source); None for the delta rule."""
    context: Float[Tensor, "batch context hidden"] | None = None
    """What the layer was given at the last few tokens, at which gates and addresses look back, and behind it the values
    of reversed heads; 0 before the first one. None inside a recurrence, which needs the matrices alone."""

    @classmethod
    def zeros(cls, batch: int, heads: int, rank: int, head_dim: int, device: torch.device | None = None) -> FastWeights:
        """An empty memory. Writable from the start, because the map into the key space is a parameter, not state."""
        return cls(torch.zeros(batch, heads, rank, head_dim, device=device))

    @classmethod
    def where(cls, rows: Bool[Tensor, " batch"], yes: FastWeights, no: FastWeights) -> FastWeights:
        """Row by row, one state or the other."""
        return yes.zip(no, lambda a, b: torch.where(rows.view(-1, *(1,) * (a.dim() - 1)), a, b))

    def map(self, change: Callable[[Tensor], Tensor]) -> FastWeights:
        """The same change to every part."""
        return FastWeights(*(None if part is None else change(part) for part in self))  # type: ignore[arg-type]

    def zip(self, other: FastWeights, join: Callable[[Tensor, Tensor], Tensor]) -> FastWeights:
        """Part by part with another state of the same rule."""
        parts = zip(self, other, strict=True)
        return FastWeights(*(None if a is None or b is None else join(a, b) for a, b in parts))  # type: ignore[arg-type]

    @property
    def matrices(self) -> FastWeights:
        """Without the context: what a recurrence goes on from."""
        return self._replace(context=None)

    def detach(self) -> FastWeights:
        """Cut off from the graph."""
        return self.map(Tensor.detach)

    @property
    def num_bytes(self) -> int:
        """Size of one state of this batch, in bytes."""
        return sum(part.numel() * part.element_size() for part in self if part is not None)
