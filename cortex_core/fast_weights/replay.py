"""Replaying writes: the state that some logged writes make of an earlier one. What is left out was never written.

The doses are those of the log, so nothing is asked of a gate again. Tokens that wrote nothing are not in the log; where
every token is a tick, they are known by the gaps between positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cortex_core.fast_weights.chunk import scan
from cortex_core.fast_weights.rules import Dose, Rule
from cortex_core.fast_weights.state import FastWeights


class Written(NamedTuple):
    """What some tokens wrote, or would have with a write of 0."""

    keys: Float[Tensor, "batch heads tokens key_dim"]
    values: Float[Tensor, "batch heads tokens head_dim"]
    write: Float[Tensor, "batch heads tokens"]
    ticks: Float[Tensor, "batch heads tokens"]

    def at(self, index: Int[Tensor, "batch chosen"]) -> Written:
        """The tokens at `index` of each row."""
        picked = index[:, None].expand(-1, self.write.shape[1], -1)

        def pick(x: Tensor) -> Tensor:
            if x.dim() == 3:
                return x.gather(2, picked)
            return x.gather(2, picked[..., None].expand(-1, -1, -1, x.shape[-1]))

        return Written(*map(pick, self))

    def then(self, other: Written) -> Written:
        """Each row of this, followed by the same row of `other`."""
        return Written(*(torch.cat(parts, dim=2) for parts in zip(self, other, strict=True)))

    def detach(self) -> Written:
        """Cut off from the graph."""
        return Written(*(part.detach() for part in self))


class _LoggedDose:
    """A gate that has decided already."""

    needs_surprise = False

    def __init__(self, dose: Dose) -> None:
        self.dose = dose

    def __call__(self, surprise: Tensor | None, now: slice) -> Dose:
        return Dose(*(None if part is None else part[:, :, now] for part in self.dose))  # type: ignore[arg-type]


def logged(
    written: Written,
    positions: Int[Tensor, "batch writes"],
    counts: Int[Tensor, " batch"],
    start: Int[Tensor, " batch"],
    *,
    per_token: bool,
) -> Dose:
    """The doses of a row's first `counts` writes, 0 for the padding behind them. `start` is the position from which
    the row is replayed; with `per_token`, every token since then counts as a tick, written or not."""
    real = (torch.arange(positions.shape[1], device=positions.device) < counts[:, None])[:, None]
    idle = None
    if per_token:
        before = torch.cat([start[:, None] - 1, positions[:, :-1]], dim=1)
        idle = ((positions - before - 1)[:, None] * real).to(written.write.dtype).expand_as(written.write)
    return Dose(written.write * real, written.ticks * real, idle)


@torch.no_grad()
def replay(
    rule: Rule,
    written: Written,
    positions: Int[Tensor, "batch writes"],
    counts: Int[Tensor, " batch"],
    base: FastWeights,
    start: Int[Tensor, " batch"],
    stop: Int[Tensor, " batch"],
    *,
    per_token: bool,
    chunk_size: int,
) -> FastWeights:
    """The state at position `stop` of each row, from `base` at position `start` and the row's first `counts` writes.

    Positions ascend and lie in [start, stop). Equal to `rules.step_by_step` over all the tokens, up to rounding.
    """
    state, last = base, start - 1
    if positions.shape[1]:
        gate = _LoggedDose(logged(written, positions, counts, start, per_token=per_token))
        keys, values, tokens = written.keys, written.values, positions.shape[1]
        state = scan(rule, keys, keys, values, gate, base, tokens, chunk_size, read=False).final
        latest = positions.gather(1, (counts - 1).clamp_min(0)[:, None])[:, 0]
        last = torch.where(counts > 0, latest, last)
    if not per_token:
        return state
    heads = rule.log_decay.shape[0]
    return rule.faded(state, (stop - last - 1)[:, None].expand(-1, heads).to(state.up.dtype))
