"""Reading: any split of an input is the same reading, rows never meet, padding does not matter, gradients flow."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex_core.backbone import reading
from cortex_core.backbone.model import Cortex
from cortex_core.errors import ConfigError
from tests.backbone.families import KINDS, ROTARY, bare, open_gates, random_ids, small_memory, with_memory

TOLERANCE = 2e-6


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and float((a - b).detach().abs().max()) < TOLERANCE


@pytest.mark.parametrize(("family", "kind"), KINDS)
@torch.no_grad()
def test_any_split_is_the_same_reading(family: str, kind: dict[str, Any]) -> None:
    model, ids = with_memory(family, **kind), random_ids(2, 100)
    whole, session = model.new_session(2), model.new_session(2)
    expected = model(input_ids=ids, session=whole).logits
    parts, start = [], 0
    for tokens in (7, 25, 1, 40, 27):
        parts.append(model(input_ids=ids[:, start : start + tokens], session=session).logits)
        start += tokens
    assert close(torch.cat(parts, dim=1), expected)
    assert session.num_tokens.tolist() == [100, 100]
    assert all(close(session.states[n].up, whole.states[n].up) for n in whole.states)


@settings(max_examples=15)
@given(cuts=st.lists(st.integers(0, 89), max_size=4), reads=st.booleans())
@torch.no_grad()
def test_any_split_by_hypothesis(cuts: list[int], reads: bool) -> None:
    model, ids = with_memory(layers=(1,)), random_ids(1, 90, seed=3)
    expected = model(input_ids=ids).logits[:, -1]
    session, edges = model.new_session(), sorted({0, 89, *cuts})
    for start, stop in itertools.pairwise(edges):
        piece = ids[:, start:stop]
        model.read(piece, session) if reads else model(input_ids=piece, session=session)
    assert close(model(input_ids=ids[:, 89:], session=session).logits[:, -1], expected)


@torch.no_grad()
def test_memory_reaches_beyond_the_segment() -> None:
    """The logits of a later segment depend on an earlier one through the memory, and through nothing else."""
    model, ids = with_memory(), random_ids(1, 96)
    changed = ids.clone()
    changed[0, 3] = (changed[0, 3] + 1) % 90 + 3
    assert not torch.equal(model(input_ids=ids).logits[:, 64:], model(input_ids=changed).logits[:, 64:])
    closed = with_memory(open_gate=False)
    assert torch.equal(closed(input_ids=ids).logits[:, 64:], closed(input_ids=changed).logits[:, 64:])


@torch.no_grad()
def test_what_is_written_does_not_depend_on_where_segments_end() -> None:
    """In the lowest layer, whose input is the token alone: higher ones are told by attention what stands in a segment."""
    ids, found = random_ids(2, 96), []
    for segment_tokens in (8, 12, 32):
        memory = small_memory(layers=(0,)).model_copy(update={"controller": False})
        torch.manual_seed(0)
        model = Cortex.attach(bare("qwen2"), memory, segment_tokens=segment_tokens)
        open_gates(model)
        session = model.new_session(2)
        model.read(ids, session)
        model.read(ids[:, :1], session)  # closes the last segment
        assert session.start_tokens.tolist() == [96, 96]
        found.append(session.states[0])
    assert found[0].up.any() and all(close(state.up, found[0].up) for state in found[1:])


@torch.no_grad()
def test_blocks_do_not_change_the_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = with_memory(), random_ids(2, 300)
    expected = model(input_ids=ids).logits
    monkeypatch.setattr(reading, "BLOCK_TOKENS", 128)
    assert close(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ROTARY)
@torch.no_grad()
def test_padding_does_not_matter(family: str, side: str) -> None:
    model, ids = with_memory(family), random_ids(3, 80)
    lengths = [20, 47, 80]
    for widest in (20, 80):  # within one segment, and over several
        mask = torch.zeros(3, widest, dtype=torch.long)
        for row, length in enumerate(min(n, widest) - row for row, n in enumerate(lengths)):
            mask[row, widest - length :] = 1
        mask = mask.flip(1) if side == "right" else mask
        batch = model(input_ids=ids[:, :widest] * mask, attention_mask=mask).logits
        for row in range(3):
            real = mask[row].bool()
            alone = model(input_ids=ids[row : row + 1, :widest][:, real]).logits
            assert close(batch[row : row + 1, real], alone), (row, widest)


@torch.no_grad()
def test_rows_and_sessions_never_mix() -> None:
    model, ids = with_memory(), random_ids(3, 100)
    together = model.new_session(3)
    model.read(ids, together)
    for row in range(3):
        alone, other = model.new_session(), model.new_session()
        model.read(ids[row : row + 1, :60], alone)
        model.read(random_ids(1, 77, seed=9), other)  # another session in between leaves no trace
        model.read(ids[row : row + 1, 60:], alone)
        for layer, state in alone.states.items():
            assert close(state.up, together.states[layer].up[row : row + 1])


@torch.no_grad()
def test_a_row_that_changes_changes_no_other_row_by_a_bit() -> None:
    model, ids = with_memory(), random_ids(3, 100)
    changed = ids.clone()
    changed[1] = random_ids(1, 100, seed=5)[0]
    before, after = model(input_ids=ids).logits, model(input_ids=changed).logits
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.equal(before[1], after[1])


@torch.no_grad()
def test_a_fork_goes_its_own_way() -> None:
    model, ids = with_memory(), random_ids(1, 100)
    session = model.new_session()
    model.read(ids[:, :70], session)
    fork = session.fork()
    model.read(random_ids(1, 50, seed=8), fork)
    fresh = model.new_session()
    model.read(ids[:, :70], fresh)
    assert all(torch.equal(session.states[n].up, fresh.states[n].up) for n in fresh.states)
    assert session.num_tokens.tolist() == [70]


@torch.no_grad()
def test_logits_to_keep_and_reset() -> None:
    model, ids = with_memory(), random_ids(2, 100)
    session = model.new_session(2)
    full = model(input_ids=ids).logits
    assert close(model(input_ids=ids, session=session, logits_to_keep=5).logits, full[:, -5:])
    session.reset()
    assert session.num_tokens.tolist() == [0, 0]
    assert close(model(input_ids=ids, session=session).logits, full)


@torch.no_grad()
def test_reward_is_kept_with_the_open_segment() -> None:
    model, ids = with_memory(), random_ids(1, 60)
    reward = torch.linspace(-1, 1, 60)[None]
    expected = model(input_ids=ids, reward=reward).logits
    session = model.new_session()
    model(input_ids=ids[:, :20], reward=reward[:, :20], session=session)
    rest = model(input_ids=ids[:, 20:], reward=reward[:, 20:], session=session).logits
    assert close(rest, expected[:, 20:])
    assert not close(model(input_ids=ids).logits, expected)


@torch.no_grad()
def test_metrics_are_numbers_of_this_reading() -> None:
    model = with_memory()
    metrics = model(input_ids=random_ids(2, 50)).metrics
    assert 0 < metrics["memory/write_frac"] <= 1
    assert 0 < metrics["memory/surprise"] <= 1
    assert metrics["memory/state_norm"] > 0


def test_wrong_shapes_are_refused() -> None:
    model = with_memory()
    with pytest.raises(ConfigError, match=r"shape \[3, 5\], the session has 2 rows"):
        model(input_ids=random_ids(3, 5), session=model.new_session(2))
    with pytest.raises(ConfigError, match="attention_mask has shape"):
        model(input_ids=random_ids(1, 5), attention_mask=torch.ones(1, 4), session=model.new_session())


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma3"])
def test_gradient_checkpointing_gives_the_same_gradients(family: str) -> None:
    results = []
    for checkpointed in (False, True):
        model = with_memory(family)
        if checkpointed:
            model.checkpoint_gradients()
        model(input_ids=random_ids(2, 90)).logits.pow(2).mean().backward()
        results.append({name: p.grad.clone() for name, p in model.sidecars.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    assert len(results[0]) > 10
    for name, gradient in results[0].items():
        assert torch.allclose(gradient, results[1][name], rtol=1e-4, atol=1e-9), name
