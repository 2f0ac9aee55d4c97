"""The write rules a chunk at a time: one unit-triangular solve per chunk, all chunks of a segment at once.

Derivation: README.md beside this file. Equal to `rules.step_by_step` in outputs, gradients and final state. Tokens are
never looped over; chunks are in `linear_recurrence` alone, segments only where the gate asks for surprise, which is
measured against the state at the start of the segment. On a GPU the delta rule runs in `kernel` instead.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from cortex_core.fast_weights.recurrence import linear_recurrence
from cortex_core.fast_weights.rules import Dose, Gate, Rule
from cortex_core.fast_weights.signals import surprise
from cortex_core.fast_weights.state import FastWeights


class Scan(NamedTuple):
    """The result of one pass of a layer's memory over its tokens."""

    outputs: Float[Tensor, "batch heads tokens head_dim"] | None
    """What each token reads, after its own write; None if it was not asked for."""
    write: Float[Tensor, "batch heads tokens"]
    """How strongly each token was written, 0 to `write_strength`."""
    surprise: Float[Tensor, "batch heads tokens"]
    """Each token's surprise against the state at the start of its segment."""
    final: FastWeights
    """State after the last token."""
    snapshot: FastWeights
    """State at the start of each row's `snapshot_segment`; the final state where that lies past the end."""


class Tiles(NamedTuple):
    """The tokens of a segment in chunks of one size: [batch, heads, chunks, size, ...]. Padding writes nothing."""

    keys: Tensor
    queries: Tensor
    values: Tensor
    write: Tensor
    ticks: Tensor
    idle: Tensor | None

    def log_faded(self, rule: Rule) -> Tensor | float:
        """ln of what the tokens that stood before each one and wrote nothing leave; 0 where there are none."""
        return 0.0 if self.idle is None else self.idle * rule.log_idle[:, None, None]


def scan(
    rule: Rule,
    keys: Float[Tensor, "batch heads tokens key_dim"],
    queries: Float[Tensor, "batch heads tokens key_dim"],
    values: Float[Tensor, "batch heads tokens head_dim"],
    gate: Gate,
    initial: FastWeights,
    segment_tokens: int,
    chunk_size: int,
    *,
    snapshot_segment: Int[Tensor, " batch"] | None = None,
    read: bool = True,
) -> Scan:
    """Scan over segments; the first token opens one, the last may be short. Float32 throughout.

    `chunk_size` changes the speed alone. `read=False` computes the state alone: all that is needed of text on which
    nothing will be predicted.
    """
    state = snapshot = initial
    outputs, writes, surprises = [], [], []
    # Without surprise nothing has to wait for the state: all segments are one.
    period = segment_tokens if gate.needs_surprise or snapshot_segment is not None else keys.shape[2]
    for number, start in enumerate(range(0, keys.shape[2], period)):
        if snapshot_segment is not None:
            snapshot = FastWeights.where(snapshot_segment >= number, state, snapshot)
        now = slice(start, start + period)
        k, q, v = (x[:, :, now] for x in (keys, queries, values))
        surprised = surprise(v, rule.predict(k, state))
        dose = gate(surprised, now)
        out, state = _segment(rule, k, q, v, dose, state, chunk_size, read)
        outputs.append(out)
        writes.append(dose.write)
        surprises.append(surprised)
    if snapshot_segment is None:
        snapshot = state
    else:
        snapshot = FastWeights.where(snapshot_segment >= math.ceil(keys.shape[2] / period), state, snapshot)
    joined = _joined(outputs) if read else None
    return Scan(joined, _joined(writes), _joined(surprises), state, snapshot)


def _segment(
    rule: Rule,
    keys: Tensor,
    queries: Tensor,
    values: Tensor,
    dose: Dose,
    state: FastWeights,
    chunk_size: int,
    read: bool,
) -> tuple[Tensor | None, FastWeights]:
    if keys.device.type == "cpu" and not torch.is_grad_enabled() and dose.idle is None and not dose.ticks.any():
        # Nothing is written: the state stands and a read is one product. Filler costs next to nothing. (A GPU would
        # have to be waited for to know.)
        return rule.project(queries, state) @ state.up if read else None, state
    if not rule.hebbian and _kernel_runs(keys):
        from cortex_core.fast_weights.kernel import delta_rule

        out, up = delta_rule(
            keys, queries, values, dose.write, dose.ticks, rule.log_decay, state.up, chunk_size, read=read
        )
        return out, FastWeights(up)
    tokens = keys.shape[2]
    chunks = math.ceil(tokens / chunk_size)
    size = math.ceil(tokens / chunks)  # as even as possible: 65 tokens are 33 + 32, not 64 + 1
    given = (keys, queries, values, dose.write, dose.ticks, dose.idle)
    tiles = Tiles(*(None if x is None else _tiled(x, chunks, size) for x in given))  # type: ignore[arg-type]
    out, final = (_hebbian if rule.hebbian else _delta)(rule, tiles, state, read)
    return None if out is None else out.flatten(2, 3)[:, :, :tokens], final


def _kernel_runs(keys: Tensor) -> bool:
    if not keys.is_cuda:
        return False
    from cortex_core.fast_weights.kernel import usable  # not above: it imports Triton, which takes a while

    return usable(keys.device, keys.shape[-1])


def _tiled(x: Tensor, chunks: int, size: int) -> Tensor:
    missing = chunks * size - x.shape[2]
    if missing:
        x = pad(x, (0, 0, 0, missing) if x.dim() == 4 else (0, missing))
    return x.unflatten(2, (chunks, size))


def _decays(log_kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`between[t, s]`, what is left at t of something written at s; its last row; what is left of the start.

    Sums of logarithms, so that no product underflows; every exponent is at most 0 on and below the diagonal.
    """
    total = log_kept.cumsum(-1)
    between = (total[..., :, None] - total[..., None, :]).tril().exp()
    return between, between[..., -1, :, None], total.exp()[..., None]


def _delta(rule: Rule, tiles: Tiles, state: FastWeights, read: bool) -> tuple[Tensor | None, FastWeights]:
    keys, write = tiles.keys, tiles.write[..., None]
    between, at_end, kept = _decays(tiles.ticks * rule.log_decay[:, None, None] + tiles.log_faded(rule))
    overlap = keys @ keys.transpose(-1, -2)
    system = torch.tril(write * between * overlap, -1)
    given = torch.cat([write * tiles.values, write * kept * keys], dim=-1)
    solved = torch.linalg.solve_triangular(system, given, upper=False, unitriangular=True)
    new, old = solved.split([tiles.values.shape[-1], keys.shape[-1]], dim=-1)  # errors are new - old @ S at the start
    back = (at_end * keys).transpose(-1, -2)
    states = linear_recurrence(_diagonal(kept[..., -1:, :], back @ old, -1.0), back @ new, state.up)
    final = FastWeights(states[:, :, -1])
    if not read:
        return None, final
    starts = states[:, :, :-1]
    scores = torch.tril(between * (tiles.queries @ keys.transpose(-1, -2)))
    return (kept * tiles.queries - scores @ old) @ starts + scores @ new, final


def _hebbian(rule: Rule, tiles: Tiles, state: FastWeights, read: bool) -> tuple[Tensor | None, FastWeights]:
    assert state.down is not None
    keys, write = tiles.keys, tiles.write[..., None]
    left = rule.anti_hebbian * -tiles.ticks
    between, at_end, kept = _decays(tiles.ticks * rule.log_decay[:, None, None] + left.log1p() + tiles.log_faded(rule))
    moved = write / (1.0 + left[..., None])  # a key is looked up before the anti-Hebbian term takes its share
    system = torch.tril(-moved * between * (keys @ keys.transpose(-1, -2)), -1)
    given = torch.cat([write * keys, moved * kept * keys] if rule.slow else [moved * kept * keys], dim=-1)
    solved = torch.linalg.solve_triangular(system, given, upper=False, unitriangular=True)
    old = solved[..., -keys.shape[-1] :]  # what is written is new + old @ U at the start
    back = (at_end * keys).transpose(-1, -2)
    fresh = back @ solved[..., : keys.shape[-1]] if rule.slow else torch.zeros_like(_starts(state.down, tiles))
    downs = linear_recurrence(_diagonal(kept[..., -1:, :], back @ old, 1.0), fresh, state.down)
    written = old @ downs[:, :, :-1]
    if rule.slow:
        written = written + solved[..., : keys.shape[-1]]
    gone = kept[..., -1:, :] * torch.eye(state.up.shape[-2], device=keys.device)
    ups = linear_recurrence(gone, (at_end * written).transpose(-1, -2) @ tiles.values, state.up)
    final = FastWeights(ups[:, :, -1], downs[:, :, -1])
    if not read:
        return None, final
    overlap = torch.tril(between * (tiles.queries @ keys.transpose(-1, -2)))
    asked = kept * (tiles.queries @ downs[:, :, :-1]) + overlap @ written
    if rule.slow:
        asked = asked + tiles.queries
    scores = torch.tril(between * (asked @ written.transpose(-1, -2)))
    return kept * (asked @ ups[:, :, :-1]) + scores @ tiles.values, final


def _starts(part: Tensor, tiles: Tiles) -> Tensor:
    return part[:, :, None].expand(-1, -1, tiles.keys.shape[2], -1, -1)


def _diagonal(kept: Tensor, product: Tensor, sign: float) -> Tensor:
    return kept * torch.eye(product.shape[-1], device=product.device) + sign * product


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
