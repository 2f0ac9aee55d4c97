"""Slow weights: what sleep has moved out of the fast weights, read under the same addresses.

A sparse associative memory (Kanerva 1988, "Sparse Distributed Memory"): of many slots, those answer whose prototypes
lie nearest to an address. Two facts hardly ever share a slot, so one can be learned without the other being touched,
with no more than a few steps of gradient descent on the values: everything else is fixed.

Addresses of all questions have a part in common, and each moves with what stands before the question: close to one
another, far from themselves. `fit` takes out both, once, before anything is learned.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

_LEAST_VARIANCE = 1e-6
"""Addresses have length 1; what differs by less is rounding, not context."""


class SlowWeights(nn.Module):
    """One layer's slow weights. Read 0 until `values` are trained, which nothing but sleep does."""

    def __init__(self, heads: int, rank: int, value_dim: int, *, slots: int, active: int) -> None:
        super().__init__()
        self.heads, self.active = heads, active
        generator = torch.Generator().manual_seed(slots)  # not a run's seed: all sidecars of one shape agree
        prototypes = torch.randn(slots, heads * rank, generator=generator)
        self.register_buffer("prototypes", functional.normalize(prototypes, dim=-1))
        self.prototypes: Tensor
        self.register_buffer("centre", torch.zeros(heads * rank))
        self.centre: Tensor
        self.register_buffer("spread", torch.eye(heads * rank))
        self.spread: Tensor
        self.values = nn.Parameter(torch.zeros(slots, heads * value_dim), requires_grad=False)

    @torch.no_grad()
    def fit(self, asked: Float[Tensor, "contexts items heads rank"]) -> None:
        """Centre addresses on the mean of these, and have them vary alike in all directions where only the context
        differs (within-class covariance normalization: Hatch et al. 2006, for speakers): `items` are cues, all asked
        for in each of at least 2 `contexts`. What remains tells cues apart. The covariance is shrunk towards the
        identity by the share of directions to samples. Raises ValueError where something is learned already: it would
        be looked for elsewhere.
        """
        if self.values.count_nonzero():
            raise ValueError("slow weights that hold something cannot be fitted: what they hold would not be found")
        together = functional.normalize(asked.flatten(2).double(), dim=-1)
        size, samples = together.shape[-1], (len(together) - 1) * together.shape[1]
        within = (together - together.mean(0)).flatten(0, 1)
        covariance, shrink = within.T @ within / samples, size / (size + samples)
        even = covariance.diagonal().mean().clamp_min(_LEAST_VARIANCE) * torch.eye(size).to(within)
        variances, directions = torch.linalg.eigh((1 - shrink) * covariance + shrink * even)
        self.centre.copy_(together.mean((0, 1)))
        self.spread.copy_((directions * variances.rsqrt()) @ directions.T)

    def features(
        self, addresses: Float[Tensor, "items heads rank"]
    ) -> tuple[Int[Tensor, "items active"], Float[Tensor, "items active"]]:
        """The slots that answer each address, and how strongly: cosines above that of the nearest slot that does not,
        scaled to unit length. Continuous in the address, as a slot's strength is 0 where another takes its place."""
        together = functional.normalize(addresses.flatten(1), dim=-1) - self.centre
        together = functional.normalize(together @ self.spread, dim=-1)
        near, slots = (together @ self.prototypes.T).topk(self.active + 1, dim=-1)
        return slots[:, :-1], functional.normalize(near[:, :-1] - near[:, -1:], dim=-1)

    def read(self, addresses: Float[Tensor, "items heads rank"]) -> Float[Tensor, "items heads value_dim"]:
        """What is kept under each address."""
        slots, strength = self.features(addresses)
        found = functional.embedding_bag(slots, self.values, per_sample_weights=strength, mode="sum")
        return found.unflatten(-1, (self.heads, -1))

    def forward(
        self, addresses: Float[Tensor, "batch heads tokens rank"], where: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch heads tokens value_dim"]:
        """What is kept under the addresses of some tokens; 0 at the others, which are most, and cost nothing."""
        batch, heads, tokens, _ = addresses.shape
        found = self.read(addresses.transpose(1, 2)[where])
        out = found.new_zeros(batch, tokens, heads, found.shape[-1])
        out[where] = found
        return out.transpose(1, 2)
