"""Count, mean and variance of a stream of vectors, in any number of parts (Welford 1962; Chan, Golub, LeVeque 1979).

Sums of squares, as in the source, lose all digits of a variance that is small beside the mean.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Moments(NamedTuple):
    """Of some vectors, feature by feature, float32."""

    num_vectors: Float[Tensor, ""]
    mean: Float[Tensor, "*features"]
    squares: Float[Tensor, "*features"]
    """Sum of squared distances from the mean."""

    @classmethod
    def zeros(cls, *features: int, device: torch.device | None = None) -> Moments:
        """Of no vectors."""
        return cls(*(torch.zeros(size, device=device) for size in ((), features, features)))

    @classmethod
    def of(cls, vectors: Float[Tensor, "vectors *features"], where: Bool[Tensor, " vectors"] | None = None) -> Moments:
        """Of these, or of some of these."""
        vectors = (vectors if where is None else vectors[where]).detach().float()
        if not len(vectors):
            return cls.zeros(*vectors.shape[1:], device=vectors.device)
        mean = vectors.mean(0)
        return cls(torch.tensor(float(len(vectors)), device=mean.device), mean, (vectors - mean).square().sum(0))

    def merge(self, other: Moments) -> Moments:
        """Of the vectors of both."""
        count = self.num_vectors + other.num_vectors
        share = other.num_vectors / count.clamp_min(1.0)
        apart = other.mean - self.mean
        squares = self.squares + other.squares + apart.square() * (self.num_vectors * share)
        return Moments(count, self.mean + apart * share, squares)

    @property
    def variance(self) -> Float[Tensor, "*features"]:
        """Mean squared distance from the mean, of these vectors and not of a population they were drawn from."""
        return self.squares / self.num_vectors.clamp_min(1.0)
