"""Text of any length as segments: rows of one backbone batch, each attending to itself alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cortex_core.errors import ConfigError

NEVER = 1 << 62
"""The position of something that does not expire."""
NO_SOURCE = -1


class Tags(NamedTuple):
    """What a session with a log knows of each token that it has not closed yet."""

    source: Int[Tensor, "batch tokens"]
    """Number of its source's label, or `NO_SOURCE`."""
    expires: Int[Tensor, "batch tokens"]
    """Position from which on its write is taken back, or `NEVER`."""
    silent: Bool[Tensor, "batch tokens"]
    """Whether it must not be written."""

    @classmethod
    def of(cls, input_ids: Int[Tensor, "batch tokens"]) -> Tags:
        """Of tokens of which nothing is said."""
        return cls(
            torch.full_like(input_ids, NO_SOURCE),
            torch.full_like(input_ids, NEVER),
            torch.zeros_like(input_ids, dtype=torch.bool),
        )


class Rows(NamedTuple):
    """Ragged rows of tokens, padded on the right."""

    input_ids: Int[Tensor, "batch tokens"]
    reward: Float[Tensor, "batch tokens"]
    lengths: Int[Tensor, " batch"]
    tags: Tags | None = None
    """None in sessions without a log."""

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
        tags: Tags | None = None,
    ) -> Rows:
        """Rows of the tokens under `mask`, wherever the padding is; their order is kept."""
        order = torch.argsort(~mask, dim=1, stable=True)
        lengths = mask.sum(dim=1)
        width = int(lengths.max()) if len(lengths) else 0
        order = order[:, :width]
        if tags is not None:
            tags = Tags(*(part.gather(1, order) for part in tags))
        return cls(input_ids.gather(1, order), reward.gather(1, order), lengths, tags)

    @property
    def num_bytes(self) -> int:
        """Size of all of it, in bytes."""
        parts = [self.input_ids, self.reward, self.lengths, *(self.tags or ())]
        return sum(part.numel() * part.element_size() for part in parts)

    def with_tags(self) -> Rows:
        """With tags that say nothing, unless it has some."""
        return self if self.tags is not None else self._replace(tags=Tags.of(self.input_ids))

    def of(self, chosen: Bool[Tensor, " batch"]) -> Rows:
        """Some of the rows."""
        tags = None if self.tags is None else Tags(*(part[chosen] for part in self.tags))
        return Rows(self.input_ids[chosen], self.reward[chosen], self.lengths[chosen], tags)

    def then(self, other: Rows) -> Rows:
        """Each row of this, followed by the same row of `other`."""
        ids = torch.cat([self.input_ids, other.input_ids], dim=1)
        reward = torch.cat([self.reward, other.reward], dim=1)
        tags = None
        if self.tags is not None or other.tags is not None:
            both = zip(self.with_tags().tags or (), other.with_tags().tags or (), strict=True)
            tags = Tags(*(torch.cat(parts, dim=1) for parts in both))
        return Rows.from_padded(ids, torch.cat([self.valid, other.valid], dim=1), reward, tags)

    def after(self, start: Int[Tensor, " batch"]) -> Rows:
        """Each row without its first `start` tokens."""
        position = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        return Rows.from_padded(self.input_ids, self.valid & (position >= start[:, None]), self.reward, self.tags)

    def upto(self, stop: Int[Tensor, " batch"]) -> Rows:
        """The first `stop` tokens of each row, or as many as it has."""
        return self._replace(lengths=torch.minimum(self.lengths, stop)).after(torch.zeros_like(stop))

    def to_width(self, width: int) -> Rows:
        """Padded on the right with zeros to `width` tokens."""
        missing = width - self.input_ids.shape[1]
        pad, tags = torch.nn.functional.pad, self.tags
        if tags is not None:
            filled = zip(tags, (NO_SOURCE, NEVER, False), strict=True)
            tags = Tags(*(pad(part, (0, missing), value=value) for part, value in filled))
        return Rows(pad(self.input_ids, (0, missing)), pad(self.reward, (0, missing)), self.lengths, tags)


class Layout(NamedTuple):
    """Where the tokens of a backbone batch stand: flat row b * segments + s is segment s of sequence b."""

    segments: int
    """Segments per sequence in this batch."""
    valid: Bool[Tensor, "flat width"]
    """False at padding."""
    start: Int[Tensor, " batch"]
    """Tokens read before the first token of each sequence: its position in the session."""
    reward: Float[Tensor, "flat width"]
    silent: Bool[Tensor, "flat width"] | None = None
    """True where nothing must be written; None is nowhere."""
    forced: Bool[Tensor, "flat width"] | None = None
    """True where is written at full strength, whatever the gate says; None is nowhere."""
    left_padded: bool = True
    """Whether tokens may stand behind padding. To find out takes a look at `valid`, for which a GPU is waited for."""

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
            left_padded=False,
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
        if not self.left_padded:
            return None
        width = self.valid.shape[1]
        padding = self.valid.int().argmax(dim=1)
        if not padding.any():
            return None
        return (torch.arange(width, device=padding.device) + sign * padding[:, None]) % width


def checked_rows(
    input_ids: Tensor, attention_mask: Tensor | None, reward: Tensor | None, batch: int
) -> tuple[Rows, Bool[Tensor, "batch tokens"]]:
    """What a call was given for a session of `batch` rows: as rows, and where its tokens are. Raises ConfigError."""
    if input_ids.dim() != 2 or len(input_ids) != batch:
        raise ConfigError(
            f"input_ids has shape {list(input_ids.shape)}, the session has {batch} rows: give "
            "[batch, tokens] with the same batch, or new_session(batch_size=…)"
        )
    mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    reward = torch.zeros(input_ids.shape, device=input_ids.device) if reward is None else reward.float()
    for name, value in (("attention_mask", mask), ("reward", reward)):
        if value.shape != input_ids.shape:
            raise ConfigError(
                f"{name} has shape {list(value.shape)}, input_ids {list(input_ids.shape)}: they must agree"
            )
    return Rows.from_padded(input_ids, mask, reward), mask
