"""What APOLLO's moments are taken of: a random projection of the gradient, drawn from a seed at each use, never stored.

A matrix is looked at the way round in which it is at least as wide as it is high, [m, n] with m <= n. The projection
P [r, m] shortens its columns; a column is a channel.
"""

from __future__ import annotations

import hashlib

import torch
from jaxtyping import Float
from torch import Tensor


def is_projected(parameter: Tensor, rank: int) -> bool:
    """Whether it is a matrix that `rank` dimensions shorten; everything else is updated as by AdamW."""
    return parameter.ndim == 2 and min(parameter.shape) > rank


def wide(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "m n"]:
    """A view of the matrix or of its transpose, m <= n."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def projection_seed(run_seed: int, name: str, number: int) -> int:
    """Of a parameter's projection `number`, and of nothing else: all workers and a resumed run draw the same."""
    digest = hashlib.blake2b(f"{run_seed} {number} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def draw(rank: int, size: int, seed: int, device: torch.device) -> Float[Tensor, "rank size"]:
    """Independent normal entries of variance 1 / rank, which keep lengths on average. A GPU draws others than a CPU."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(rank, size, generator=generator, device=device).mul_(rank**-0.5)
