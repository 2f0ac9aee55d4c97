"""The state of one layer's memory: a value that goes in and comes out, never an attribute of a module."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class FastWeights(NamedTuple):
    """What one layer remembers, float32: a read is `query @ up`, with the query in the layer's rank-R key space."""

    up: Float[Tensor, "batch heads rank head_dim"]
    """The values that the key space now holds (V in the source)."""
    anchor: Float[Tensor, "batch heads rank head_dim"]
    """`up` as it stood at the start of the current chunk: what surprise is measured against."""
    offset: Int[Tensor, " batch"]
    """Tokens read since that start. 0: the next token opens a chunk, and `anchor` no longer matters."""

    @classmethod
    def at_chunk_start(cls, up: Float[Tensor, "batch heads rank head_dim"]) -> FastWeights:
        """A state whose next token opens a chunk, as at every segment boundary."""
        return cls(up, up, torch.zeros(up.shape[0], dtype=torch.long, device=up.device))

    @classmethod
    def zeros(cls, batch: int, heads: int, rank: int, head_dim: int, device: torch.device | None = None) -> FastWeights:
        """An empty memory. Writable from the start, because the map into the key space is a parameter, not state."""
        return cls.at_chunk_start(torch.zeros(batch, heads, rank, head_dim, device=device))
