"""A sidecar as a whole: its precision is its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cortex_core.config import FastWeightsConfig
from cortex_core.fast_weights.sidecar import LayerShape, LayerTokens, Sidecar

BATCH, TOKENS = 2, 21
SHAPE = LayerShape(hidden=24, heads=3, head_dim=8, value_dim=8)


def sidecar(**settings: object) -> Sidecar:
    """Writes some tokens and adds to all of them."""
    torch.manual_seed(0)
    made = Sidecar(SHAPE, FastWeightsConfig(**{"rank": 8, "chunk_size": 8} | settings))
    nn.init.constant_(made.output_gate, 1.5)
    for weights in (made.write_gate.weight, made.addresses.key_taps, made.addresses.query_taps):
        nn.init.normal_(weights, std=0.3)
    return made


def tokens() -> LayerTokens:
    generator = torch.Generator().manual_seed(1)
    heads = (BATCH, SHAPE.heads, TOKENS, SHAPE.value_dim)
    positions = torch.arange(TOKENS).expand(BATCH, -1)
    return LayerTokens(
        hidden=torch.randn(BATCH, TOKENS, SHAPE.hidden, generator=generator),
        values=torch.randn(heads, generator=generator),
        attended=torch.randn(heads, generator=generator),
        valid=torch.ones(BATCH, TOKENS, dtype=torch.bool),
        positions=positions,
        reward=torch.zeros(BATCH, TOKENS),
        segment_tokens=TOKENS,
    )


@pytest.mark.parametrize("stepwise", [False, True])
def test_autocast_changes_no_bit(stepwise: bool) -> None:
    memory, found = sidecar(), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            empty = memory.empty_state(BATCH)
            reading, _ = memory(tokens(), empty, anchor=empty if stepwise else None)
        assert reading.added is not None and reading.added.any() and reading.final_state.up.any()
        found.append((reading.added, reading.final_state.up))
    (added, state), (cast_added, cast_state) = found
    assert added.dtype == cast_added.dtype == torch.float32
    assert torch.equal(added, cast_added) and torch.equal(state, cast_state)


@pytest.mark.parametrize("stepwise", [False, True])
def test_a_forced_token_is_written_whatever_the_gate_says(stepwise: bool) -> None:
    memory = sidecar()
    assert memory.write_gate is not None
    nn.init.constant_(memory.write_gate.bias, -20.0)
    forced = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    forced[0, [3, 11]] = forced[1, 20] = True
    valid = forced.new_ones(BATCH, TOKENS)
    valid[1, 20] = False
    read, empty = tokens()._replace(forced=forced, valid=valid), memory.empty_state(BATCH)
    reading, _ = memory(read, empty, anchor=empty if stepwise else None, log=True)
    assert reading.written is not None
    expected = (forced & valid)[:, None].expand(-1, SHAPE.heads, -1) * memory.config.write_strength
    if not stepwise:
        assert torch.equal(reading.write, expected)
    changed = reading.final_state.up.abs().sum(dim=(1, 2, 3)) > 0
    assert changed.tolist() == [True, False], "padding is never written"
    shut, _ = memory(read._replace(forced=None), empty, anchor=empty if stepwise else None)
    assert not shut.final_state.up.any()
    assert bool((reading.activation < memory.config.dead_zone).all()), "the penalty sees the gate itself"


@pytest.mark.parametrize("rule", ["delta", "hebbian", "source"])
def test_activations_are_those_of_a_reading_that_writes_nothing(rule: str) -> None:
    """With a memory that holds something, or surprise would be the same everywhere."""
    memory = sidecar(rule=rule, write_strength=0.02, adapter_rank=2)
    nn.init.normal_(memory.controller.out.weight)
    nn.init.normal_(memory.adapters.value_up)
    _, full = memory(tokens(), memory.empty_state(BATCH))
    read = tokens()._replace(hidden=tokens().hidden.flip(1))
    silent = read._replace(silent=torch.ones(BATCH, TOKENS, dtype=torch.bool))
    reading, _ = memory(silent, full)
    found = memory.activations(read, full)
    assert torch.allclose(found, reading.activation, atol=1e-6)
    assert not torch.allclose(memory.activations(read, memory.empty_state(BATCH)), found, atol=1e-4)
    found.sum().backward()
    got = {name: p.grad for name, p in memory.named_parameters() if p.grad is not None}
    memory.zero_grad()
    reading.activation.sum().backward()
    for name, p in memory.named_parameters():
        expected = torch.zeros_like(p) if p.grad is None else p.grad
        assert torch.allclose(got.get(name, torch.zeros_like(p)), expected, atol=1e-5), name


@pytest.mark.parametrize(
    "settings", [{}, {"reversed_frac": 0.67, "binding": True}, {"reversed_frac": 0.67, "shared_values": True}], ids=str
)
@pytest.mark.parametrize("cut", [1, 2, 5, 20])
def test_gates_and_addresses_look_back_over_a_cut(cut: int, settings: dict[str, Any]) -> None:
    """So what stands on both sides of the end of a segment is written and found as anywhere else."""
    memory = sidecar(controller=False, **settings)
    whole, _ = memory(tokens(), memory.empty_state(BATCH))
    state, added = memory.empty_state(BATCH), []
    for now in (slice(0, cut), slice(cut, TOKENS)):
        of = tokens()
        parts = {name: getattr(of, name)[:, now] for name in ("hidden", "valid", "positions", "reward")}
        parts |= {name: getattr(of, name)[:, :, now] for name in ("values", "attended")}
        reading, _ = memory(of._replace(**parts), state)
        state = reading.final_state
        added.append(reading.added)
    assert torch.allclose(torch.cat(added, dim=2), whole.added, atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(state, whole.final_state, strict=True) if a is not None)
    alone, _ = memory(of._replace(**parts), state._replace(context=torch.zeros_like(state.context)))
    assert not torch.allclose(alone.activation, reading.activation, atol=1e-4), "what stands before makes no difference"


def test_a_reversed_head_writes_what_stood_before() -> None:
    memory, read = sidecar(reversed_frac=0.67), tokens()
    before = memory.empty_state(BATCH)
    before = before._replace(context=torch.randn(before.context.shape))
    reading, _ = memory(read, before, log=True)
    first = before.context[:, -1, SHAPE.hidden :].unflatten(-1, (2, SHAPE.value_dim))
    assert torch.equal(reading.written.values[:, :2, 1:], read.values[:, :2, :-1])
    assert torch.equal(reading.written.values[:, :2, 0], first)
    assert torch.equal(reading.written.values[:, 2:], read.values[:, 2:])
    kept = reading.final_state.context[:, :, SHAPE.hidden :].unflatten(-1, (2, SHAPE.value_dim)).transpose(1, 2)
    assert torch.equal(kept, read.values[:, :2, -3:])


def test_with_shared_values_one_head_gives_back_what_all_heads_hold() -> None:
    """Token 5 is written alone, with the values of the token before in the first head, which is reversed."""
    memory, read = sidecar(shared_values=True, reversed_frac=0.34), tokens()
    nn.init.constant_(memory.write_gate.bias, -20.0)
    nn.init.constant_(memory.read_gate.bias, 20.0)
    forced = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    forced[:, 5] = True
    empty = memory.empty_state(BATCH)
    keys, queries = memory.addresses(torch.cat([empty.context[..., : SHAPE.hidden], read.hidden], dim=1), read=True)
    for head, stored in enumerate([4, 5, 5]):
        with torch.no_grad():
            memory.output_gate.copy_(torch.arange(SHAPE.heads) == head)
        reading, _ = memory(read._replace(forced=forced), empty)
        match = (keys[:, head, -TOKENS + 5, None] * queries[:, head, -TOKENS + 5 :]).sum(-1)
        expected = read.values[:, :, stored, None] * match[:, None, :, None]
        assert torch.allclose(reading.added[:, :, 5:], expected, atol=1e-5) and not reading.added[:, :, :5].any()
    assert memory.state_bytes == memory.empty_state(1).num_bytes == 4 * (3 * 8 * 24 + 3 * (24 + 24))


def test_the_context_is_that_of_the_last_tokens_that_are_there() -> None:
    """At the end of each row, and at the start of the segment whose state is asked for."""
    memory = sidecar(taps=5)
    valid = torch.arange(TOKENS) < torch.tensor([[TOKENS], [3]])
    read = tokens()._replace(valid=valid, segment_tokens=7)
    before = memory.empty_state(BATCH)._replace(context=torch.randn(BATCH, 4, SHAPE.hidden))
    reading, snapshot = memory(read, before, snapshot_segment=torch.tensor([2, 0]))
    assert torch.equal(reading.final_state.context[0], read.hidden[0, -4:])
    assert torch.equal(reading.final_state.context[1], torch.cat([before.context[1, -1:], read.hidden[1, :3]]))
    assert torch.equal(snapshot.context[0], read.hidden[0, 10:14])
    assert torch.equal(snapshot.context[1], before.context[1])
