"""The delta rule token by token: the oracle for the parallel form, and the form that generation runs.

Equations and symbols: README.md beside this file.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from cortex_core.fast_weights.signals import surprise
from cortex_core.fast_weights.state import FastWeights

WriteGate = Callable[[Float[Tensor, "batch heads tokens"], slice], Float[Tensor, "batch heads tokens"]]
"""(surprise of some tokens, which tokens) -> how strongly each is written; 0 for tokens that are padding."""


def delta_rule(
    keys: Float[Tensor, "batch heads tokens rank"],
    queries: Float[Tensor, "batch heads tokens rank"],
    values: Float[Tensor, "batch heads tokens head_dim"],
    write_gate: WriteGate,
    decay: float,
    initial_state: FastWeights,
    chunk_size: int,
) -> tuple[Float[Tensor, "batch heads tokens head_dim"], FastWeights]:
    """Read and write one token after the other: decay, surprise, gate, error-correcting write, read.

    `keys` and `queries` have unit length. Every row counts its chunks from its own `offset`, so a pass may be split
    anywhere. Padding must lie at the end of a row (its write gate is 0, its offset still moves).
    """
    state, outputs = initial_state, []
    for t in range(keys.shape[2]):
        now = slice(t, t + 1)
        opens_chunk = (state.offset == 0)[:, None, None, None]
        anchor = torch.where(opens_chunk, state.up, state.anchor)
        write = write_gate(surprise(values[:, :, now], keys[:, :, now] @ anchor), now)[..., None]
        kept = state.up * decay**write
        error = values[:, :, now] - keys[:, :, now] @ kept
        up = kept + keys[:, :, now].transpose(-1, -2) @ (write * error)
        outputs.append(queries[:, :, now] @ up)
        state = FastWeights(up, anchor, (state.offset + 1) % chunk_size)
    return torch.cat(outputs, dim=2), state
