"""Which runs of tokens are surprising enough to be kept: hysteresis on surprise over its own causal average.

A stream may be read in any number of calls: the same tokens give the same segments, bit for bit. Therefore the average
is two plain operations per token in float64, one token after the other, and everything behind it is exact comparison.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from cortex_core.config import SegmentsConfig
from cortex_core.errors import DataError

NONE = -1
"""Where no segment is open."""


class SegmentState(NamedTuple):
    """Where a batch of streams stands, on the CPU: a value that goes in and comes out."""

    num_tokens: Int[Tensor, " batch"]
    """Tokens read so far."""
    total: Float64[Tensor, " batch"]
    """Sum of the surprise of the tokens so far, each decayed by its distance."""
    weight: Float64[Tensor, " batch"]
    """The same sum over ones: `total / weight` is the average, also after few tokens."""
    first: Int[Tensor, " batch"]
    """Position at which the open segment began; NONE where none is open."""

    @classmethod
    def zeros(cls, batch: int) -> SegmentState:
        """Streams of which nothing was read."""
        none, nothing = torch.zeros(batch, dtype=torch.long), torch.zeros(batch, dtype=torch.float64)
        return cls(none, nothing, nothing, torch.full_like(none, NONE))

    def cut(self) -> SegmentState:
        """The same streams without open segments: what was open ends here (`record.finish` gives it out)."""
        return self._replace(first=torch.full_like(self.first, NONE))


class Marks(NamedTuple):
    """What each token does to its stream's segments. False everywhere at padding."""

    opened: Bool[Tensor, "batch tokens"]
    """The first token of a segment."""
    closed: Bool[Tensor, "batch tokens"]
    """The first token after a segment; it may open the next one."""
    inside: Bool[Tensor, "batch tokens"]
    """Tokens of a segment."""


@torch.no_grad()
def detect(
    surprise: Float[Tensor, "batch tokens"],
    initial_state: SegmentState,
    config: SegmentsConfig,
    *,
    valid: Bool[Tensor, "batch tokens"] | None = None,
) -> tuple[Marks, SegmentState]:
    """Open and close segments. `surprise` is anything not negative: the loss in nats, or the memory's own error.

    `valid` is False at padding, which comes last. Marks and state are on the CPU. Raises DataError for a surprise that
    is negative or not finite: it would stay in the average for good.
    """
    if valid is None:
        valid = torch.ones_like(surprise, dtype=torch.bool)
    valid = valid.cpu()
    lengths = valid.sum(1)
    values = torch.where(valid, surprise.detach().double().cpu(), 0.0)
    if not bool((torch.isfinite(values) & (values >= 0)).all()):
        wrong = float(values[~(torch.isfinite(values) & (values >= 0))][0])
        raise DataError(f"surprise = {wrong}: must be finite and at least 0; give a loss in nats or the memory's error")
    totals, weights = _averages(values, initial_state, config.average_decay)
    place = torch.arange(values.shape[1])
    # value / (total / weight), multiplied out: an average of 0 is no division by 0.
    scaled, total = values * weights[:, :-1], totals[:, :-1]
    warm = initial_state.num_tokens[:, None] + place >= config.warmup_tokens
    rises = valid & warm & (scaled > config.open_ratio * total)
    falls = valid & (scaled < config.close_ratio * total)
    marks, first = _hysteresis(rises, falls, lengths, initial_state, config)
    row = torch.arange(len(lengths))
    final = SegmentState(initial_state.num_tokens + lengths, totals[row, lengths], weights[row, lengths], first)
    return marks, final


def _averages(values: Tensor, state: SegmentState, decay: float) -> tuple[Tensor, Tensor]:
    """Decayed sums before each token and after the last, [batch, tokens + 1].

    Not a parallel scan: that would round differently wherever a stream is split. No fused multiply-add either, whose
    rounding depends on the machine. NumPy, because its calls on a batch of single numbers cost least.
    """
    new = ((1.0 - decay) * values).T.contiguous().numpy()
    share = 1.0 - decay
    total, weight = state.total.numpy().copy(), state.weight.numpy().copy()
    totals = torch.empty(len(new) + 1, values.shape[0], dtype=torch.float64)
    weights = torch.empty_like(totals)
    totals_np, weights_np = totals.numpy(), weights.numpy()
    totals_np[0], weights_np[0] = total, weight
    for t, value in enumerate(new):
        total *= decay
        total += value
        weight *= decay
        weight += share
        totals_np[t + 1], weights_np[t + 1] = total, weight
    return totals.T, weights.T


def _hysteresis(
    rises: Tensor, falls: Tensor, lengths: Tensor, state: SegmentState, config: SegmentsConfig
) -> tuple[Marks, Tensor]:
    """From border to border, in integers. Borders are many where surprise is that of single tokens: a round of small
    tensor operations for each costs more, unless there are dozens of rows."""
    next_rise, next_fall = _next(rises).tolist(), _next(falls).tolist()
    opened, closed, after = torch.zeros_like(rises), torch.zeros_like(falls), torch.full_like(state.first, NONE)
    for row, (tokens, read, first) in enumerate(
        zip(lengths.tolist(), state.num_tokens.tolist(), state.first.tolist(), strict=True)
    ):
        # Positions within this call; an open segment may have begun before it.
        first = None if first == NONE else first - read
        now, starts, stops = 0, [], []
        while now < tokens:
            if first is None:
                now = next_rise[row][now]
                if now < tokens:
                    first = now
                    starts.append(now)
            else:
                soonest = min(max(now, first + config.min_tokens), tokens)
                now = max(now, min(next_fall[row][soonest], first + config.max_tokens))
                if now < tokens:
                    first = None
                    stops.append(now)
        opened[row, starts] = True
        closed[row, stops] = True
        after[row] = NONE if first is None else first + read
    depth = (state.first != NONE).long()[:, None] + opened.long().cumsum(1) - closed.long().cumsum(1)
    inside = (depth > 0) & (torch.arange(rises.shape[1]) < lengths[:, None])
    return Marks(opened, closed, inside), after


def _next(where: Tensor) -> Tensor:
    """The first true position at or after each, [batch, tokens + 1]; the number of tokens where there is none."""
    tokens = where.shape[1]
    places = torch.where(where, torch.arange(tokens), tokens)
    places = torch.nn.functional.pad(places, (0, 1), value=tokens)
    return places.flip(1).cummin(1).values.flip(1)
