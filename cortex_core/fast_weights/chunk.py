"""The delta rule, a chunk at a time: one unit-triangular solve per chunk instead of a loop over its tokens.

Derivation: README.md beside this file. Equal to `rules.delta_rule` in outputs, gradients and final state.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cortex_core.fast_weights.rules import WriteGate
from cortex_core.fast_weights.signals import surprise


class Scan(NamedTuple):
    """The result of one pass of a layer's memory over its tokens."""

    outputs: Float[Tensor, "batch heads tokens head_dim"] | None
    """What each token reads, after its own write; None if it was not asked for."""
    write: Float[Tensor, "batch heads tokens"]
    """How strongly each token was written, 0 to `write_strength`."""
    surprise: Float[Tensor, "batch heads tokens"]
    """Each token's surprise against the state at the start of its chunk."""
    final: Float[Tensor, "batch heads rank head_dim"]
    """State after the last token."""
    snapshot: Float[Tensor, "batch heads rank head_dim"]
    """State at the start of each row's `snapshot_chunk`; the final state where that lies past the end."""


def delta_scan(
    keys: Float[Tensor, "batch heads tokens rank"],
    queries: Float[Tensor, "batch heads tokens rank"],
    values: Float[Tensor, "batch heads tokens head_dim"],
    write_gate: WriteGate,
    decay: float,
    initial_up: Float[Tensor, "batch heads rank head_dim"],
    chunk_size: int,
    *,
    snapshot_chunk: Int[Tensor, " batch"] | None = None,
    read: bool = True,
) -> Scan:
    """Scan over chunks. The first token opens a chunk; the last chunk may be short. Float32 throughout.

    `read=False` computes the state alone: all that is needed of text on which nothing will be predicted.
    """
    up = snapshot = initial_up
    outputs, writes, surprises = [], [], []
    for index, start in enumerate(range(0, keys.shape[2], chunk_size)):
        if snapshot_chunk is not None:
            snapshot = torch.where((snapshot_chunk >= index)[:, None, None, None], up, snapshot)
        now = slice(start, start + chunk_size)
        out, up, write, surprised = _chunk(keys, queries, values, write_gate, decay, up, now, read)
        outputs.append(out)
        writes.append(write)
        surprises.append(surprised)
    if snapshot_chunk is None:
        snapshot = up
    else:
        past_the_end = snapshot_chunk >= math.ceil(keys.shape[2] / chunk_size)
        snapshot = torch.where(past_the_end[:, None, None, None], up, snapshot)
    joined = torch.cat(outputs, dim=2) if read else None
    return Scan(joined, torch.cat(writes, dim=2), torch.cat(surprises, dim=2), up, snapshot)


def _chunk(keys, queries, values, write_gate, decay, up, now, read):  # noqa: ANN001, ANN202
    keys, values = keys[:, :, now], values[:, :, now]
    predicted = keys @ up
    surprised = surprise(values, predicted)
    write = write_gate(surprised, now)
    if not torch.is_grad_enabled() and not write.any():
        # Nothing is written: the state stands and a read is one product. Filler costs next to nothing.
        return queries[:, :, now] @ up if read else None, up, write, surprised
    log_kept = (write * math.log(decay)).cumsum(-1)
    kept = log_kept.exp()[..., None]
    # between[t, s]: what is left at t of something written at s; exponents are <= 0 below the diagonal.
    between = (log_kept[..., :, None] - log_kept[..., None, :]).tril().exp()
    system = torch.tril(write[..., None] * between * (keys @ keys.transpose(-1, -2)), -1)
    errors = write[..., None] * (values - kept * predicted)
    errors = torch.linalg.solve_triangular(system, errors, upper=False, unitriangular=True)
    left_at_end = between[..., -1, :, None]
    final = kept[..., -1:, :] * up + (left_at_end * keys).transpose(-1, -2) @ errors
    if not read:
        return None, final, write, surprised
    queries = queries[:, :, now]
    scores = torch.tril(between * (queries @ keys.transpose(-1, -2)))
    return kept * (queries @ up) + scores @ errors, final, write, surprised
