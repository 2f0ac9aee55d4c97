"""The chunk-parallel form of the memory and its oracle on the same random streams, to be timed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from cortex_core.config import BackboneConfig, FastWeightsConfig
from cortex_core.fast_weights import chunk
from cortex_core.fast_weights.rules import Dose, Rule, step_by_step
from cortex_core.fast_weights.state import FastWeights

BATCH, HEADS, TOKENS, HEAD_DIM, RANK = 1, 4, 4096, 64, 16
CHUNK_SIZE, SEGMENT = FastWeightsConfig().chunk_size, BackboneConfig().segment_tokens
RULE = Rule(torch.full((HEADS,), math.log(0.98)))


def streams(tokens: int, batch: int = BATCH) -> dict[str, Tensor]:
    """Random keys, queries, values and gate of one layer, and a state that holds something."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(batch, HEADS, *shape, generator=generator)

    unit: Callable[[Tensor], Tensor] = lambda x: functional.normalize(x, dim=-1)  # noqa: E731
    drawn = {"keys": unit(random(tokens, RANK)), "queries": unit(random(tokens, RANK))}
    drawn |= {"values": random(tokens, HEAD_DIM), "gate": random(tokens), "up": random(RANK, HEAD_DIM)}
    return {name: value.requires_grad_() for name, value in drawn.items()}


@dataclass
class Opening:
    """Open where the memory was wrong, or by the token alone; exactly 0 for about half of the tokens."""

    gate: Tensor
    needs_surprise: bool = True

    def __call__(self, surprise: Tensor | None, now: slice) -> Dose:
        wrong = surprise if self.needs_surprise and surprise is not None else 0.5
        opened = (self.gate[:, :, now] + wrong - 0.5).clamp(0, 1)
        return Dose(opened, opened)


def oracle_forward(inputs: dict[str, Tensor], *, needs_surprise: bool = False) -> Tensor:
    """Token by token; a number that depends on all outputs and the final state."""
    keys, queries, values, gate, up = inputs.values()
    start = FastWeights(up)
    out, state = step_by_step(RULE, keys, queries, values, Opening(gate, needs_surprise), start, start)
    return out.square().mean() + state.up.square().mean()


def scan_forward(inputs: dict[str, Tensor], chunk_size: int = CHUNK_SIZE, *, needs_surprise: bool = False) -> Tensor:
    """Chunk by chunk; the same number."""
    keys, queries, values, gate, up = inputs.values()
    opening = Opening(gate, needs_surprise)
    result = chunk.scan(RULE, keys, queries, values, opening, FastWeights(up), SEGMENT, chunk_size)
    assert result.outputs is not None
    return result.outputs.square().mean() + result.final.up.square().mean()


def oracle(inputs: dict[str, Tensor], *, needs_surprise: bool = True) -> None:
    """Token by token, forward and backward."""
    torch.autograd.grad(oracle_forward(inputs, needs_surprise=needs_surprise), [*inputs.values()])


def scan(
    inputs: dict[str, Tensor], chunk_size: int = CHUNK_SIZE, *, needs_surprise: bool = True, gradients: bool = True
) -> None:
    """Chunk by chunk, forward and backward."""
    loss = scan_forward(inputs, chunk_size, needs_surprise=needs_surprise)
    if gradients:
        torch.autograd.grad(loss, [*inputs.values()])


def transformers_scan(inputs: dict[str, Tensor], *, gradients: bool = True) -> Tensor:
    """The same without surprise, by transformers' own chunked form; the same number but for the scale of queries."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    keys, queries, values, gate, up = inputs.values()
    write = Opening(gate, needs_surprise=False)(None, slice(None)).write
    streams = (x.transpose(1, 2) for x in (queries * RANK**0.5, keys, values, write * RULE.log_decay[:, None], write))
    out, state = torch_chunk_gated_delta_rule(*streams, initial_state=up, output_final_state=True)
    assert state is not None
    loss = out.square().mean() + state.square().mean()
    if gradients:
        torch.autograd.grad(loss, [*inputs.values()])
    return loss


def saved_bytes(run: Callable[[dict[str, Tensor]], Tensor], inputs: dict[str, Tensor]) -> int:
    """Storage of what autograd keeps for the backward pass of `run`, each once, inputs apart."""
    given = {x.untyped_storage().data_ptr() for x in inputs.values()}
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        loss = run(inputs)
    total = sum(sizes.values())
    del loss
    return total
