"""The statistics of many segments as tensors, and the part of them that a small code can hope to keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cortex_core.consolidation.record import Segment
from cortex_core.errors import ConfigError, DataError, IncompatibleError

LEAST_VARIANCE = 1e-8
"""Below this a variance counts as this: a segment of one token has none, and its logarithm would be infinite."""


class Statistics(NamedTuple):
    """What segments did, all memory layers side by side."""

    mean: Float[Tensor, "segments layers hidden"]
    log_variance: Float[Tensor, "segments layers hidden"]
    delta_up: Float[Tensor, "segments layers heads rank head_dim"]

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> Statistics:
        """Raises DataError without segments, IncompatibleError unless all segments and layers have the same shapes."""
        if not segments:
            raise DataError("segments: there are none; read something surprising first, or lower open_ratio")
        rows = [[segment.stats[layer] for layer in sorted(segment.stats)] for segment in segments]
        layers = {tuple(sorted(segment.stats)) for segment in segments}
        shapes = {(tuple(stats.mean.shape), tuple(stats.delta_up.shape)) for row in rows for stats in row}
        if len(layers) != 1 or len(shapes) != 1:
            raise IncompatibleError(
                f"segments of memory layers {sorted(layers)} with shapes {sorted(shapes)}: a coder is for one model "
                "whose memory layers are alike; code the others apart"
            )

        def stacked(name: str) -> Tensor:
            return torch.stack([torch.stack([getattr(stats, name) for stats in row]) for row in rows]).float()

        log_variance = stacked("variance").clamp_min(LEAST_VARIANCE).log()
        return cls(stacked("mean"), log_variance, stacked("delta_up"))


class Recoverable(NamedTuple):
    """What a code is made of and says again: means, log-variances, and the largest singular directions of each head's
    change, `left @ right`, each of the two with the root of their strength."""

    mean: Float[Tensor, "segments layers hidden"]
    log_variance: Float[Tensor, "segments layers hidden"]
    left: Float[Tensor, "segments layers heads rank directions"]
    right: Float[Tensor, "segments layers heads directions head_dim"]

    @classmethod
    def of(cls, statistics: Statistics, num_directions: int) -> Recoverable:
        """Without what lies in further directions. Raises ConfigError for more directions than a change can have.

        A direction's sign is arbitrary: the largest entry of `right` is made positive, so that equal changes have equal
        factors.
        """
        most = min(statistics.delta_up.shape[-2:])
        if num_directions > most:
            raise ConfigError(f"num_directions = {num_directions}: a change of rank {most} has at most {most}")
        left, strength, right = torch.linalg.svd(statistics.delta_up, full_matrices=False)
        left, strength, right = (
            left[..., :num_directions],
            strength[..., :num_directions],
            right[..., :num_directions, :],
        )
        largest = right.gather(-1, right.abs().argmax(-1, keepdim=True))
        signed = strength.sqrt()[..., None] * torch.where(largest < 0, -1.0, 1.0)
        return cls(statistics.mean, statistics.log_variance, left * signed.mT, right * signed)

    @property
    def delta_up(self) -> Float[Tensor, "segments layers heads rank head_dim"]:
        """The changes that the factors make: the nearest to the whole ones of this rank."""
        return self.left @ self.right

    def at(self, index: Int[Tensor, " chosen"]) -> Recoverable:
        """Some of the segments."""
        return Recoverable(*(part[index] for part in self))


def low_rank_share(delta_up: Float[Tensor, "segments layers heads rank head_dim"], num_directions: int) -> float:
    """Share of the squared entries of all changes that these directions hold, 0 to 1: what can be recovered at most."""
    strengths = torch.linalg.svdvals(delta_up).square()
    return float(strengths[..., :num_directions].sum() / strengths.sum().clamp_min(1e-30))
