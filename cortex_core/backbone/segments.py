"""Text of any length as segments: rows of one backbone batch, each attending to itself alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Rows(NamedTuple):
    """Ragged rows of tokens, padded on the right."""

    input_ids: Int[Tensor, "batch tokens"]
    reward: Float[Tensor, "batch tokens"]
    lengths: Int[Tensor, " batch"]

    @property
    def valid(self) -> Bool[Tensor, "batch tokens"]:
        """True at tokens, False at padding."""
        return torch.arange(self.input_ids.shape[1], device=self.input_ids.device) < self.lengths[:, None]

    @classmethod
    def empty(cls, batch: int, device: torch.device | None = None) -> Rows:
        """Rows without any token."""
        ids = torch.zeros(batch, 0, dtype=torch.long, device=device)
        return cls(ids, ids.float(), torch.zeros(batch, dtype=torch.long, device=device))

    @classmethod
    def from_padded(
        cls,
        input_ids: Int[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"],
        reward: Float[Tensor, "batch tokens"],
    ) -> Rows:
        """Rows of the tokens under `mask`, wherever the padding is; their order is kept."""
        order = torch.argsort(~mask, dim=1, stable=True)
        lengths = mask.sum(dim=1)
        width = int(lengths.max()) if len(lengths) else 0
        order = order[:, :width]
        return cls(input_ids.gather(1, order), reward.gather(1, order), lengths)

    def then(self, other: Rows) -> Rows:
        """Each row of this, followed by the same row of `other`."""
        ids = torch.cat([self.input_ids, other.input_ids], dim=1)
        reward = torch.cat([self.reward, other.reward], dim=1)
        return Rows.from_padded(ids, torch.cat([self.valid, other.valid], dim=1), reward)

    def after(self, start: Int[Tensor, " batch"]) -> Rows:
        """Each row without its first `start` tokens."""
        position = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        return Rows.from_padded(self.input_ids, self.valid & (position >= start[:, None]), self.reward)

    def to_width(self, width: int) -> Rows:
        """Padded on the right with zeros to `width` tokens."""
        missing = width - self.input_ids.shape[1]
        pad = torch.nn.functional.pad
        return Rows(pad(self.input_ids, (0, missing)), pad(self.reward, (0, missing)), self.lengths)


class Layout(NamedTuple):
    """Where the tokens of a backbone batch stand: flat row b * segments + s is segment s of sequence b."""

    segments: int
    """Segments per sequence in this batch."""
    valid: Bool[Tensor, "flat width"]
    """False at padding."""
    start: Int[Tensor, " batch"]
    """Tokens read before the first token of each sequence: its position in the session."""
    reward: Float[Tensor, "flat width"]

    @classmethod
    def plain(cls, input_ids: Int[Tensor, "batch segments width"], start: int) -> Layout:
        """Whole segments without padding or reward, after `start` tokens."""
        batch, segments, width = input_ids.shape
        flat, device = (batch * segments, width), input_ids.device
        return cls(
            segments,
            torch.ones(flat, dtype=torch.bool, device=device),
            torch.full((batch,), start, dtype=torch.long, device=device),
            torch.zeros(flat, device=device),
        )

    def to_sequences(self, x: Tensor) -> Tensor:
        """[flat, width, ...] to [batch, segments * width, ...], padding on the left moved to the right."""
        index = self._left_aligned(1)
        if index is not None:
            x = x.gather(1, index.view(*index.shape, *(1,) * (x.dim() - 2)).expand_as(x))
        return x.reshape(-1, self.segments * x.shape[1], *x.shape[2:])

    def to_flat(self, x: Tensor) -> Tensor:
        """The inverse of `to_sequences`."""
        x = x.reshape(self.valid.shape[0], self.valid.shape[1], *x.shape[2:])
        index = self._left_aligned(-1)
        if index is not None:
            x = x.gather(1, index.view(*index.shape, *(1,) * (x.dim() - 2)).expand_as(x))
        return x

    def positions(self) -> Int[Tensor, "batch tokens"]:
        """Position of every token in its session (of padding: of the last token before it)."""
        valid = self.to_sequences(self.valid).long()
        return (self.start[:, None] + valid.cumsum(1) - 1).clamp_min(0)

    def _left_aligned(self, sign: int) -> Tensor | None:
        width = self.valid.shape[1]
        padding = self.valid.int().argmax(dim=1)
        if not padding.any():
            return None
        return (torch.arange(width, device=padding.device) + sign * padding[:, None]) % width
