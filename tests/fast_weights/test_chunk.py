"""The parallel forms against the token-by-token oracle: outputs, every gradient, final state, any length, any split."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex_core.fast_weights.chunk import Scan, scan
from cortex_core.fast_weights.rules import Dose, Rule, step_by_step
from cortex_core.fast_weights.state import FastWeights
from tests.fast_weights.rule_scenes import (
    BATCH,
    CHUNK,
    DIM,
    HEADS,
    RANK,
    RULES,
    SEGMENT,
    STRENGTH,
    Opening,
    gate_of,
    gradients,
    oracle,
    relative_error,
    state_of,
    streams,
)  # fmt: skip

DELTA = RULES["delta"]


def scanned(name: str, inputs: dict, gate: object = None, rule: Rule | None = None, **options: object) -> Scan:
    chosen = gate_of(name, inputs) if gate is None else gate
    k, q, v = inputs["keys"], inputs["queries"], inputs["values"]
    return scan(rule or RULES[name], k, q, v, chosen, state_of(inputs), SEGMENT, CHUNK, **options)  # type: ignore[arg-type]


def always(strength: float, ticks: float = 1.0):  # noqa: ANN201
    """A gate that is as open for every token."""
    gate = lambda surprise, now: Dose(torch.full_like(surprise, strength), torch.full_like(surprise, ticks))  # noqa: E731
    gate.needs_surprise = True  # type: ignore[attr-defined]
    return gate


@pytest.mark.parametrize("needs_surprise", [True, False])
@pytest.mark.parametrize("tokens", [1, 7, 63, 64, 130, 1000])
@pytest.mark.parametrize("name", RULES)
def test_equals_the_oracle(name: str, tokens: int, needs_surprise: bool) -> None:
    inputs = {part: value.requires_grad_() for part, value in streams(name, tokens).items()}
    gate = gate_of(name, inputs, needs_surprise=needs_surprise)
    expected, state = oracle(RULES[name], inputs, gate)
    found = scanned(name, inputs, gate)
    assert found.outputs is not None
    assert relative_error(expected, found.outputs) < 1e-5
    assert relative_error(state.up, found.final.up) < 1e-5
    if state.down is not None:
        assert found.final.down is not None and relative_error(state.down, found.final.down) < 1e-5
    pairs = zip(gradients(expected, state, inputs), gradients(found.outputs, found.final, inputs), strict=True)
    assert max(relative_error(a, b) for a, b in pairs) < 1e-5


@pytest.mark.parametrize("name", RULES)
def test_bfloat16_inputs_lose_nothing_but_their_own_rounding(name: str) -> None:
    rounded, exact = streams(name, 130, dtype=torch.bfloat16), streams(name, 130)
    expected, _ = oracle(RULES[name], exact, gate_of(name, exact))
    same_inputs, _ = oracle(RULES[name], rounded, gate_of(name, rounded))
    found = scanned(name, rounded).outputs
    assert found is not None
    assert relative_error(same_inputs, found) < 1e-5
    assert 1e-5 < relative_error(expected, found) < 5e-2


@pytest.mark.parametrize("log_decay", [0.0, math.log(1e-3), math.log(1e-6)])
def test_decays_of_any_size(log_decay: float) -> None:
    inputs = {part: value.requires_grad_() for part, value in streams("delta", 200).items()}
    rule = Rule(torch.full((HEADS,), log_decay))
    expected, state = oracle(rule, inputs, gate_of("delta", inputs))
    found = scanned("delta", inputs, rule=rule)
    assert found.outputs is not None and relative_error(expected, found.outputs) < 1e-5
    pairs = zip(gradients(expected, state, inputs), gradients(found.outputs, found.final, inputs), strict=True)
    assert max(relative_error(a, b) for a, b in pairs) < 1e-5


@settings(max_examples=15, deadline=None)
@given(cut=st.integers(1, SEGMENT - 1), seed=st.integers(0, 1000), name=st.sampled_from([*RULES]))
def test_the_oracle_may_be_split_anywhere(cut: int, seed: int, name: str) -> None:
    s = streams(name, SEGMENT, seed)
    start, gate = state_of(s), gate_of(name, s)
    whole, final = step_by_step(RULES[name], s["keys"], s["queries"], s["values"], gate, start, start)
    parts, state = [], start
    for part in (slice(0, cut), slice(cut, SEGMENT)):
        k, q, v = (s[kind][:, :, part] for kind in ("keys", "queries", "values"))
        later = Opening(s["gate"][:, :, part], gate.strength, per_token=gate.per_token)
        out, state = step_by_step(RULES[name], k, q, v, later, state, start)
        parts.append(out)
    assert torch.equal(torch.cat(parts, dim=2), whole)
    assert torch.equal(state.up, final.up)


@settings(max_examples=15, deadline=None)
@given(segments=st.integers(1, 5), seed=st.integers(0, 1000), name=st.sampled_from([*RULES]))
def test_a_scan_may_be_split_between_segments(segments: int, seed: int, name: str) -> None:
    s = streams(name, 6 * SEGMENT, seed)
    whole = scanned(name, s)
    first, second = ({part: x if x.shape[2] != 6 * SEGMENT else x[:, :, now] for part, x in s.items()}
                     for now in (slice(0, segments * SEGMENT), slice(segments * SEGMENT, None)))  # fmt: skip
    before = scanned(name, first)
    after = scanned(name, second | {k: v for k, v in before.final._asdict().items() if v is not None})
    assert before.outputs is not None and after.outputs is not None and whole.outputs is not None
    assert relative_error(whole.outputs, torch.cat([before.outputs, after.outputs], dim=2)) < 1e-5
    assert relative_error(whole.final.up, after.final.up) < 1e-5


@pytest.mark.parametrize("chunk", [1, 5, 64, 1000])
@pytest.mark.parametrize("name", RULES)
def test_the_chunk_size_changes_nothing_but_the_speed(name: str, chunk: int) -> None:
    s = streams(name, 130)
    k, q, v = s["keys"], s["queries"], s["values"]
    other = scan(RULES[name], k, q, v, gate_of(name, s), state_of(s), SEGMENT, chunk)
    expected = scanned(name, s)
    assert other.outputs is not None and expected.outputs is not None
    assert relative_error(expected.outputs, other.outputs) < 1e-5


@pytest.mark.parametrize("name", RULES)
def test_a_snapshot_is_the_state_at_the_start_of_its_segment(name: str) -> None:
    s = streams(name, 130)
    snapshot = scanned(name, s, snapshot_segment=torch.tensor([0, 2])).snapshot
    start = {part: x[:, :, : 2 * SEGMENT] if x.shape[2] == 130 else x for part, x in s.items()}
    after_two = scanned(name, start).final
    for part, initial, later in zip(snapshot, state_of(s), after_two, strict=True):
        if part is not None and initial is not None and later is not None:
            assert torch.equal(part[0], initial[0]) and torch.equal(part[1], later[1])
    past_the_end = scanned(name, s, snapshot_segment=torch.tensor([3, 9]))
    assert torch.equal(past_the_end.snapshot.up, past_the_end.final.up)


@pytest.mark.parametrize("name", RULES)
def test_state_alone_is_the_same_state(name: str) -> None:
    s = streams(name, 70)
    full, state_only = scanned(name, s), scanned(name, s, read=False)
    assert state_only.outputs is None
    assert torch.equal(state_only.final.up, full.final.up)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", ["delta", "hebbian"])
def test_a_gap_without_writes_leaves_the_state_bit_for_bit(name: str, grad: bool) -> None:
    s = streams(name, 500)
    with torch.set_grad_enabled(grad):
        shut = scanned(name, s, always(0.0, 0.0))
    for part, initial in zip(shut.final, state_of(s), strict=True):
        assert part is initial is None or (part is not None and initial is not None and torch.equal(part, initial))


@settings(max_examples=50, deadline=None)
@given(
    decay=st.floats(1e-6, 1.0),
    scale=st.floats(1e-3, 1e3),
    strength=st.floats(0.0, 1.99),
    repeat=st.booleans(),
    seed=st.integers(0, 100),
)
def test_the_delta_rule_is_bounded_for_any_input(
    decay: float, scale: float, strength: float, repeat: bool, seed: int
) -> None:
    """|S_t| <= decay**w |S_(t-1)| + w |v_t| as long as w < 2 (README): never more than the sum of what was written."""
    s = streams("delta", 130, seed)
    if repeat:
        s["keys"] = s["keys"][:, :, :1].expand_as(s["keys"])
    s["values"] = s["values"] * scale
    found = scanned("delta", s, always(strength, strength), rule=Rule(torch.full((HEADS,), math.log(decay))))
    initial, norms = s["up"].norm(dim=(-2, -1)), s["values"].norm(dim=-1)
    final = found.final.up.norm(dim=(-2, -1))
    assert torch.isfinite(final).all()
    assert (final <= (initial + strength * norms.sum(-1)) * (1 + 1e-4)).all()
    if decay < 0.999 and strength > 0.01:
        steady = strength * norms.amax(-1) / (1 - decay**strength)
        assert (final <= torch.maximum(steady, initial) * (1 + 1e-4)).all()


@settings(max_examples=50, deadline=None)
@given(
    decay=st.floats(1e-6, 0.999),
    anti=st.floats(0.0, 0.5),
    share=st.floats(0.0, 0.99),
    gate=st.floats(0.0, 1.0),
    repeat=st.booleans(),
    seed=st.integers(0, 100),
)
def test_the_hebbian_rule_is_bounded_for_any_input(
    decay: float, anti: float, share: float, gate: float, repeat: bool, seed: int
) -> None:
    """With strength alpha below anti - ln(decay) (README), mu the difference: |U| <= alpha / (1 - exp(-mu)), and
    |V| <= alpha (1 + |U|) max|v| / (1 - decay exp(-anti)), from an empty memory."""
    strength = share * (anti - math.log(decay))
    s = streams("hebbian", 130, seed)
    s["up"], s["down"] = torch.zeros_like(s["up"]), torch.zeros_like(s["down"])
    if repeat:
        s["keys"] = s["keys"][:, :, :1].expand_as(s["keys"])
    rule = Rule(torch.full((HEADS,), math.log(decay)), hebbian=True, anti_hebbian=anti)
    final = scanned("hebbian", s, always(strength * gate, gate), rule=rule).final
    down = strength / -math.expm1(strength - anti + math.log(decay))
    up = strength * (1 + down) * s["values"].norm(dim=-1).amax(-1) / -math.expm1(math.log(decay) - anti)
    assert final.down is not None and torch.isfinite(final.down).all() and torch.isfinite(final.up).all()
    assert (torch.linalg.matrix_norm(final.down, 2) <= down * (1 + 1e-3) + 1e-6).all()
    assert (final.up.norm(dim=(-2, -1)) <= up * (1 + 1e-3) + 1e-6).all()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), repeat=st.booleans(), opened=st.floats(0.0, 1.0))
def test_the_clamp_of_the_source_never_acts_on_unit_keys_and_values(seed: int, repeat: bool, opened: float) -> None:
    """Which is why its rule has a parallel form, and why its anti-Hebbian term is plain decay."""
    s = streams("source", 200, seed)
    s["up"] = torch.zeros_like(s["up"])
    if repeat:
        s["keys"], s["values"] = (s[part][:, :, :1].expand_as(s[part]).contiguous() for part in ("keys", "values"))
    gate = always(STRENGTH["source"] * opened, 1.0)
    clamped, state = step_by_step(RULES["source"], s["keys"], s["queries"], s["values"], gate, state_of(s), state_of(s))
    free, _ = step_by_step(
        RULES["source"]._replace(clamp=False), s["keys"], s["queries"], s["values"], gate, state_of(s), state_of(s)
    )
    assert torch.equal(clamped, free)
    assert state.down is not None and float(state.up.abs().max()) <= 1 and float(state.down.abs().max()) <= 1


def test_the_source_rule_forgets_how_to_write() -> None:
    """Nothing restores what decays of its way into the key space: after 1,000 tokens no write is left to be seen."""
    s = streams("source", 1000)
    final = scanned("source", s, always(STRENGTH["source"], 1.0)).final
    assert final.down is not None and float(final.down.abs().max()) < 1e-10 and float(final.up.abs().max()) < 1e-9


@pytest.mark.parametrize("name", ["delta", "hebbian"])
def test_padding_changes_nothing(name: str) -> None:
    """A row whose tail is not written ends as if it had stopped before."""
    s = streams(name, 90)
    s["gate"][:, :, 70:] = -10.0
    short = {part: x[:, :, :70] if x.shape[2] == 90 else x for part, x in s.items()}
    assert relative_error(scanned(name, short).final.up, scanned(name, s).final.up) < 1e-6


def test_a_written_key_is_read_back_exactly() -> None:
    """Orthogonal keys, full strength: the delta rule stores one value per key and overwrites it cleanly."""
    keys = torch.eye(RANK).expand(BATCH, HEADS, RANK, RANK)
    keys = torch.cat([keys, keys[:, :, :1]], dim=2)
    values = torch.randn(BATCH, HEADS, RANK + 1, DIM)
    s = {"keys": keys, "queries": keys, "values": values, "up": torch.zeros(BATCH, HEADS, RANK, DIM)}
    found = scanned("delta", s, always(1.0, 0.0), rule=Rule(torch.zeros(HEADS)))
    expected = torch.cat([values[:, :, -1:], values[:, :, 1:RANK]], dim=2)
    assert torch.allclose(keys[:, :, :RANK] @ found.final.up, expected, atol=1e-5)
    assert isinstance(found.final, FastWeights) and found.final.down is None
