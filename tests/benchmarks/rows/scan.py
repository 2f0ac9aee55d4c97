"""The chunk-parallel form of the memory and its oracle on the same random streams, to be timed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from cortex_core.config import FastWeightsConfig
from cortex_core.fast_weights.chunk import delta_scan
from cortex_core.fast_weights.rules import WriteGate, delta_rule
from cortex_core.fast_weights.state import FastWeights

BATCH, HEADS, TOKENS, HEAD_DIM, RANK = 2, 4, 1024, 64, 16
CHUNK_SIZE, DECAY = FastWeightsConfig().chunk_size, FastWeightsConfig().decay


def streams(tokens: int, batch: int = BATCH) -> dict[str, Tensor]:
    """Random keys, queries, values and gate of one layer, and a state that holds something."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(batch, HEADS, *shape, generator=generator)

    unit: Callable[[Tensor], Tensor] = lambda x: functional.normalize(x, dim=-1)  # noqa: E731
    drawn = {"keys": unit(random(tokens, RANK)), "queries": unit(random(tokens, RANK))}
    drawn |= {"values": random(tokens, HEAD_DIM), "gate": random(tokens), "up": random(RANK, HEAD_DIM)}
    return {name: value.requires_grad_() for name, value in drawn.items()}


def gate_of(gate: Tensor) -> WriteGate:
    """Open where the memory was wrong, exactly 0 for about half of the tokens."""
    return lambda surprise, now: (gate[:, :, now] + surprise - 0.5).clamp(0, 1)


def oracle(inputs: dict[str, Tensor]) -> None:
    """Token by token, forward and backward."""
    keys, queries, values, gate, up = inputs.values()
    start = FastWeights.at_chunk_start(up)
    out, state = delta_rule(keys, queries, values, gate_of(gate), DECAY, start, CHUNK_SIZE)
    torch.autograd.grad(out.square().mean() + state.up.square().mean(), [*inputs.values()])


def scan(inputs: dict[str, Tensor], chunk_size: int = CHUNK_SIZE) -> None:
    """Chunk by chunk, forward and backward."""
    keys, queries, values, gate, up = inputs.values()
    result = delta_scan(keys, queries, values, gate_of(gate), DECAY, up, chunk_size)
    assert result.outputs is not None
    torch.autograd.grad(result.outputs.square().mean() + result.final.square().mean(), [*inputs.values()])
