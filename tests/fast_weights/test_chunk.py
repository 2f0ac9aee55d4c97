"""The parallel form against the token-by-token oracle: outputs, every gradient, final state, any length, any split."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from cortex_core.fast_weights.chunk import delta_scan
from cortex_core.fast_weights.rules import delta_rule
from cortex_core.fast_weights.state import FastWeights

BATCH, HEADS, RANK, DIM, CHUNK = 2, 3, 8, 16, 32


def streams(tokens: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(BATCH, HEADS, *shape, generator=generator)

    return {
        "keys": functional.normalize(random(tokens, RANK), dim=-1),
        "queries": functional.normalize(random(tokens, RANK), dim=-1),
        "values": random(tokens, DIM),
        "gate": random(tokens),
        "up": random(RANK, DIM),
    }


def surprised_gate(gate: Tensor):  # noqa: ANN201
    """A gate that needs the state: open where the memory was wrong, exactly 0 for about half of the tokens."""
    return lambda surprise, now: (gate[:, :, now] + surprise - 0.5).clamp(0, 1)


def gradients(outputs: Tensor, final: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    loss = (outputs * torch.randn(outputs.shape, generator=generator)).sum()
    return torch.autograd.grad(loss + (final * torch.randn(final.shape, generator=generator)).sum(), inputs)


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / a.detach().abs().max().clamp_min(1e-12))


@pytest.mark.parametrize("tokens", [1, 7, 31, 32, 33, 64, 130, 300])
@pytest.mark.parametrize("decay", [1.0, 0.9, 1e-3])
def test_equals_the_oracle(tokens: int, decay: float) -> None:
    inputs = {name: value.requires_grad_() for name, value in streams(tokens).items()}
    k, q, v, gate, up = inputs.values()
    expected, state = delta_rule(k, q, v, surprised_gate(gate), decay, FastWeights.at_chunk_start(up), CHUNK)
    scan = delta_scan(k, q, v, surprised_gate(gate), decay, up, CHUNK)
    assert scan.outputs is not None
    assert relative_error(expected, scan.outputs) < 1e-5
    assert relative_error(state.up, scan.final) < 1e-5
    pairs = zip(
        gradients(expected, state.up, [*inputs.values()]),
        gradients(scan.outputs, scan.final, [*inputs.values()]),
        strict=True,
    )
    assert max(relative_error(a, b) for a, b in pairs) < 1e-5


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(0, 99), seed=st.integers(0, 1000))
def test_the_oracle_may_be_split_anywhere(cut: int, seed: int) -> None:
    s = streams(100, seed)
    start = FastWeights.at_chunk_start(s["up"])
    whole, final = delta_rule(s["keys"], s["queries"], s["values"], surprised_gate(s["gate"]), 0.9, start, CHUNK)
    parts, state = [], start
    for part in (slice(0, cut), slice(cut, 100)):
        if part.start == part.stop:
            continue
        streams_ = (s[name][:, :, part] for name in ("keys", "queries", "values"))
        out, state = delta_rule(*streams_, surprised_gate(s["gate"][:, :, part]), 0.9, state, CHUNK)
        parts.append(out)
    assert torch.equal(torch.cat(parts, dim=2), whole)
    assert torch.equal(state.up, final.up)


def test_a_snapshot_is_the_state_at_the_start_of_its_chunk() -> None:
    s = streams(100)
    gate = surprised_gate(s["gate"])
    args = (s["keys"], s["queries"], s["values"], gate, 0.9, s["up"], CHUNK)
    snapshot = delta_scan(*args, snapshot_chunk=torch.tensor([0, 2])).snapshot
    after_two = delta_scan(*(x[:, :, :64] for x in args[:3]), *args[3:]).final
    assert torch.equal(snapshot[0], s["up"][0])
    assert torch.equal(snapshot[1], after_two[1])
    past_the_end = delta_scan(*args, snapshot_chunk=torch.tensor([4, 9]))
    assert torch.equal(past_the_end.snapshot, past_the_end.final)


def test_state_alone_is_the_same_state() -> None:
    s = streams(70)
    args = (s["keys"], s["queries"], s["values"], surprised_gate(s["gate"]), 0.9, s["up"], CHUNK)
    full, state_only = delta_scan(*args), delta_scan(*args, read=False)
    assert state_only.outputs is None
    assert torch.equal(state_only.final, full.final)


def test_a_gap_without_writes_leaves_the_state_bit_for_bit() -> None:
    s = streams(500)
    shut = delta_scan(
        s["keys"], s["queries"], s["values"], lambda surprise, now: torch.zeros_like(surprise), 0.5, s["up"], CHUNK
    )
    assert torch.equal(shut.final, s["up"])


@settings(max_examples=50, deadline=None)
@given(
    decay=st.floats(1e-6, 1.0),
    scale=st.floats(1e-3, 1e3),
    strength=st.floats(0.0, 1.99),
    repeat=st.booleans(),
    seed=st.integers(0, 100),
)
def test_the_state_is_bounded_for_any_input(
    decay: float, scale: float, strength: float, repeat: bool, seed: int
) -> None:
    """|S_t| <= decay**w |S_(t-1)| + w |v_t| as long as w < 2 (README): never more than the sum of what was written."""
    s = streams(130, seed)
    keys = s["keys"][:, :, :1].expand_as(s["keys"]) if repeat else s["keys"]
    values = s["values"] * scale
    scan = delta_scan(
        keys, s["queries"], values, lambda surprise, now: torch.full_like(surprise, strength), decay, s["up"], CHUNK
    )
    bound = s["up"].norm(dim=(-2, -1)) + strength * values.norm(dim=-1).sum(-1)
    assert torch.isfinite(scan.final).all()
    assert (scan.final.norm(dim=(-2, -1)) <= bound * (1 + 1e-4)).all()
    if decay < 0.999 and strength > 0.01:
        steady = strength * values.norm(dim=-1).amax(-1) / (1 - decay**strength)
        assert (scan.final.norm(dim=(-2, -1)) <= torch.maximum(steady, s["up"].norm(dim=(-2, -1))) * (1 + 1e-4)).all()


def test_a_written_key_is_read_back_exactly() -> None:
    """Orthogonal keys, full strength: the delta rule stores one value per key and overwrites it cleanly."""
    keys = torch.eye(RANK).expand(1, 1, RANK, RANK)
    keys = torch.cat([keys, keys[:, :, :1]], dim=2)
    values = torch.randn(1, 1, RANK + 1, DIM)
    scan = delta_scan(
        keys, keys, values, lambda surprise, now: torch.ones_like(surprise), 1.0, torch.zeros(1, 1, RANK, DIM), CHUNK
    )
    expected = torch.cat([values[:, :, -1:], values[:, :, 1:RANK]], dim=2)
    assert torch.allclose(keys[:, :, :RANK] @ scan.final, expected, atol=1e-5)
