"""Slow weights: a sparse associative memory, and a sidecar that writes only what it does not know."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cortex_core.config import FastWeightsConfig
from cortex_core.errors import ConfigError
from cortex_core.fast_weights.sidecar import Sidecar
from cortex_core.fast_weights.slow import SlowWeights
from tests.fast_weights.test_sidecar import BATCH, TOKENS, sidecar, tokens

HEADS, RANK, WIDTH, SLOTS, ACTIVE = 3, 8, 5, 64, 6


def slow(filled: bool = True, *, slots: int = SLOTS) -> SlowWeights:
    made = SlowWeights(HEADS, RANK, WIDTH, slots=slots, active=ACTIVE)
    if filled:
        made.values.data.normal_(generator=torch.Generator().manual_seed(5))
    return made


def addresses(items: int, seed: int = 0) -> Tensor:
    found = torch.randn(items, HEADS, RANK, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(found, dim=-1)


def test_as_a_loop_over_slots_has_it() -> None:
    memory, asked = slow(), addresses(9)
    for address, found in zip(asked, memory.read(asked), strict=True):
        flat = address.flatten() / address.flatten().norm()
        cosines = [float(flat @ prototype) for prototype in memory.prototypes]
        order = sorted(range(SLOTS), key=lambda slot: -cosines[slot])
        strengths = torch.tensor([cosines[slot] - cosines[order[ACTIVE]] for slot in order[:ACTIVE]])
        strengths = strengths / strengths.norm()
        expected = sum(s * memory.values[slot] for s, slot in zip(strengths, order[:ACTIVE], strict=True))
        torch.testing.assert_close(found.flatten(), expected)


@given(seed=st.integers(0, 2**31), step=st.floats(1e-6, 1e-3))
def test_a_small_step_of_the_address_is_a_small_step_of_what_is_read(seed: int, step: float) -> None:
    """Also where another slot takes a place among those that answer."""
    memory, asked = slow(), addresses(16, seed).double()
    memory.double()
    moved = asked + step * torch.nn.functional.normalize(addresses(16, seed + 1).double(), dim=-1)
    _slots, strength = memory.features(asked)
    assert torch.allclose(strength.norm(dim=-1), torch.ones(16, dtype=torch.float64))
    # Strengths are divided by their length, and so is the step.
    near = (torch.nn.functional.normalize(asked.flatten(1), dim=-1) @ memory.prototypes.T).topk(ACTIVE + 1).values
    length = (near[:, :-1] - near[:, -1:]).norm(dim=-1)
    change = (memory.read(moved) - memory.read(asked)).flatten(1).norm(dim=-1)
    assert (change <= 8 * step * memory.values.norm() / length).all()


def test_other_facts_are_hardly_touched_by_a_new_one() -> None:
    memory, known = slow(slots=1024), addresses(200)
    before = memory.read(known)
    memory.values.requires_grad_()
    wanted = torch.ones(1, HEADS, WIDTH)
    new = addresses(1, seed=1)
    (0.5 * (memory.read(new) - wanted).square().sum()).backward()
    assert memory.values.grad is not None
    memory.values.data -= memory.values.grad  # strengths have length 1: one step of size 1 is enough
    torch.testing.assert_close(memory.read(new), wanted)
    moved = (memory.read(known) - before).flatten(1).norm(dim=-1) / (wanted - 0).norm()
    assert moved.median() < 0.02 and (moved == 0).float().mean() > 0.3


def in_context(contexts: int, items: int, seed: int = 0) -> Tensor:
    """Addresses of the same cues in several contexts: a part that all share, and two directions that tell contexts
    apart, and of which no cue has more than a little."""
    cues, shared, moved = (addresses(n, seed + at).flatten(1) for at, n in enumerate((items, 1, 2)))
    generator = torch.Generator().manual_seed(seed + 9)
    sizes = 1.5 * torch.randn(contexts, items, 2, generator=generator)
    found = cues + 1.5 * shared + sizes @ moved
    return torch.nn.functional.normalize(found.unflatten(-1, (HEADS, RANK)), dim=-1)


def overlaps(memory: SlowWeights, asked: Tensor) -> tuple[float, float]:
    """Of features: of one cue in two contexts, mean; and of two cues in these contexts, root mean square."""
    first, second = (
        torch.zeros(asked.shape[1], len(memory.prototypes)).scatter(1, *memory.features(part)) for part in asked[:2]
    )
    both = first @ second.T
    same = both.diagonal().clone()
    return float(same.mean()), float(both.fill_diagonal_(0).square().mean().sqrt())


@pytest.mark.parametrize("seed", range(3))
def test_fitted_addresses_tell_cues_apart_and_contexts_less(seed: int) -> None:
    """On cues and contexts that it was not fitted to."""
    memory, given = slow(filled=False, slots=1024), in_context(8, 300, seed)
    fitted_to, others = given[:4, :200], given[4:, 200:]
    same, other = overlaps(memory, others)
    memory.fit(fitted_to)
    same_after, other_after = overlaps(memory, others)
    assert same_after > 1.3 * same and other_after < 0.7 * other


@given(seed=st.integers(0, 2**31))
def test_a_fit_depends_on_neither_order_nor_the_length_of_addresses(seed: int) -> None:
    one, other, given = slow(filled=False), slow(filled=False), in_context(3, 40, seed)
    one.fit(given)
    other.fit(3.0 * given.flip(0, 1))
    for name in ("centre", "spread"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=1e-4, rtol=1e-3)
    asked = addresses(5, seed)
    torch.testing.assert_close(one.features(asked)[1], one.features(2.0 * asked)[1], atol=1e-4, rtol=1e-3)


def test_contexts_that_change_nothing_bend_nothing() -> None:
    """Only the mean goes: rounding is not blown up."""
    memory, cues = slow(filled=False), addresses(50)
    memory.fit(cues.expand(4, -1, -1, -1))
    mean = torch.nn.functional.normalize(cues.flatten(1), dim=-1).mean(0)
    torch.testing.assert_close(memory.centre, mean)
    scale = memory.spread.diagonal().mean()
    torch.testing.assert_close(memory.spread / scale, torch.eye(HEADS * RANK), atol=1e-4, rtol=0)


def test_what_holds_something_is_not_fitted() -> None:
    memory = slow()
    with pytest.raises(ValueError, match="hold something"):
        memory.fit(in_context(2, 10))
    assert not memory.centre.any()


def test_tokens_that_are_not_asked_for_read_nothing() -> None:
    memory = slow()
    asked = addresses(2 * 7).view(2, 7, HEADS, RANK).transpose(1, 2)
    where = torch.zeros(2, 7, dtype=torch.bool)
    where[0, 3] = where[1, 6] = True
    found = memory(asked, where)
    torch.testing.assert_close(found[0, :, 3], memory.read(asked[0, :, 3][None])[0])
    found[0, :, 3] = found[1, :, 6] = 0
    assert not found.any()
    assert not memory(asked, torch.zeros_like(where)).any()


def grown(**settings: object) -> tuple[Sidecar, Sidecar]:
    """A memory, and the same with slow weights that hold something."""
    plain, with_slow = (sidecar(**settings, **more) for more in ({}, {"slow_slots": SLOTS, "slow_active": ACTIVE}))
    missing, unexpected = with_slow.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and {name.split(".")[0] for name in missing} == {"slow"}
    return plain, with_slow


@pytest.mark.parametrize("shared", [False, True])
def test_before_any_sleep_nothing_changes(shared: bool) -> None:
    plain, with_slow = grown(shared_values=shared)
    empty = plain.empty_state(BATCH)
    (one, _), (other, _) = (memory(tokens(), empty) for memory in (plain, with_slow))
    assert one.added is not None and other.added is not None and one.added.any()
    assert torch.equal(one.added, other.added) and torch.equal(one.final_state.up, other.final_state.up)


def test_what_is_known_is_not_written_again() -> None:
    """The slow weights answer each key with the value that is told there."""
    _, memory = grown(controller=False, shared_values=False)
    assert memory.slow is not None
    given, empty = tokens(), memory.empty_state(BATCH)
    reading, _ = memory(given, empty, log=True)
    assert reading.written is not None
    keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (reading.written.keys, reading.written.values))
    slots, strength = memory.slow.features(keys)
    features = torch.zeros(len(keys), SLOTS).scatter(1, slots, strength)
    memory.slow.values.data = torch.linalg.lstsq(features, values.flatten(1), driver="gelsd").solution
    after, _ = memory(given, empty)
    assert after.final_state.up.norm() < 1e-3 * reading.final_state.up.norm()


def test_fast_and_slow_weights_together_answer_what_was_told_last() -> None:
    """Whatever the slow weights answer: a write adds what is missing."""
    _, memory = grown(controller=False)
    assert memory.slow is not None
    memory.slow.values.data.normal_()
    given = tokens()._replace(forced=torch.ones(BATCH, TOKENS, dtype=torch.bool))
    reading, _ = memory(given, memory.empty_state(BATCH), log=True)
    assert reading.written is not None
    key = reading.written.keys[:, :, -1:]
    together = key @ reading.final_state.up + memory.slow(key, torch.ones(BATCH, 1, dtype=torch.bool))
    torch.testing.assert_close(together[:, :, 0], given.values[:, :, -1], atol=1e-4, rtol=1e-4)


def test_token_by_token_as_all_at_once() -> None:
    _, memory = grown()
    assert memory.slow is not None
    memory.slow.values.data.normal_()
    given, empty = tokens(), memory.empty_state(BATCH)
    whole, _ = memory(given, empty)
    state, added = empty, []
    for at in range(TOKENS):
        parts = {
            name: None if part is None else part[:, :, at : at + 1] if part.dim() == 4 else part[:, at : at + 1]
            for name, part in given._asdict().items()
            if name != "segment_tokens"
        }
        reading, _ = memory(given._replace(**parts), state, anchor=empty)
        state = reading.final_state
        added.append(reading.added)
    torch.testing.assert_close(torch.cat(added, dim=2), whole.added, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state.up, whole.final_state.up, atol=1e-5, rtol=1e-4)


def test_gates_say_the_same_where_nothing_is_written() -> None:
    _, memory = grown(write_strength=0.0)
    assert memory.slow is not None
    memory.slow.values.data.normal_()
    empty = memory.empty_state(BATCH)
    reading, _ = memory(tokens(), empty)
    torch.testing.assert_close(memory.activations(tokens(), empty), reading.activation)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"slow_slots": 16, "slow_active": 16}, "slow_active = 16 must be less than slow_slots = 16"),
        ({"slow_slots": 64, "rule": "hebbian", "write_strength": 0.02}, "needs rule"),
    ],
)
def test_sizes_that_cannot_work_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=said):
        FastWeightsConfig(**settings)  # type: ignore[arg-type]
