"""Replay: the logged writes make the state again; what is left out was never written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cortex_core.fast_weights.chunk import scan
from cortex_core.fast_weights.replay import Written, replay
from cortex_core.fast_weights.rules import Dose, Rule, step_by_step
from cortex_core.fast_weights.state import FastWeights
from tests.fast_weights.rule_scenes import (
    BATCH,
    CHUNK,
    HEADS,
    RANK,
    RULES,
    SEGMENT,
    STRENGTH,
    relative_error,
    state_of,
    streams,
)

TOKENS = 120
EXACT = 1e-5


class Fixed:
    """Doses as they are given."""

    needs_surprise = False

    def __init__(self, write: Tensor, ticks: Tensor) -> None:
        self.write, self.ticks = write, ticks

    def __call__(self, surprise: Tensor | None, now: slice) -> Dose:
        return Dose(self.write[:, :, now], self.ticks[:, :, now])


def doses(name: str, inputs: dict[str, Tensor], *, per_token: bool, written: Tensor) -> Fixed:
    """About a third of the tokens under `written` [batch, tokens], each in some heads only."""
    gate = inputs["gate"].clamp(0, 1) * written[:, None]
    return Fixed(gate * STRENGTH[name], torch.ones_like(gate) if per_token else gate)


def token_by_token(rule: Rule, inputs: dict[str, Tensor], gate: Fixed) -> FastWeights:
    initial = state_of(inputs)
    return step_by_step(rule, inputs["keys"], inputs["queries"], inputs["values"], gate, initial, initial)[1]


def logged(inputs: dict[str, Tensor], gate: Fixed) -> tuple[Written, Tensor, Tensor]:
    """Only the written tokens, ragged over rows, with junk as padding."""
    some = (gate.write > 0).any(1)
    counts = some.sum(1)
    index = torch.argsort(~some, dim=1, stable=True)[:, : int(counts.max())]
    everything = Written(inputs["keys"], inputs["values"], gate.write, gate.ticks)
    return everything.at(index), index, counts


def sparse(seed: int = 3) -> Tensor:
    return torch.rand(BATCH, TOKENS, generator=torch.Generator().manual_seed(seed)) < torch.tensor([[0.5], [0.3]])


@pytest.mark.parametrize("per_token", [False, True], ids=["per_write", "per_token"])
@pytest.mark.parametrize("name", RULES)
def test_replaying_all_writes_gives_the_state_again(name: str, per_token: bool) -> None:
    inputs = streams(name, TOKENS)
    gate = doses(name, inputs, per_token=per_token, written=sparse())
    written, positions, counts = logged(inputs, gate)
    assert counts.tolist() != [counts[0]] * BATCH and int(counts.max()) < TOKENS
    start = torch.tensor([7, 0])
    found = replay(
        RULES[name], written, positions + start[:, None], counts, state_of(inputs), start, start + TOKENS,
        per_token=per_token, chunk_size=CHUNK,
    )  # fmt: skip
    expected = token_by_token(RULES[name], inputs, gate)
    in_chunks = scan(
        RULES[name], inputs["keys"], inputs["queries"], inputs["values"], gate, state_of(inputs), SEGMENT, CHUNK
    ).final
    for part, other, again in zip(expected, in_chunks, found, strict=True):
        if part is not None and again is not None and other is not None:
            assert relative_error(part, again) < EXACT
            assert relative_error(other, again) < EXACT


@pytest.mark.parametrize("per_token", [False, True], ids=["per_write", "per_token"])
@pytest.mark.parametrize("name", RULES)
def test_what_is_left_out_was_never_written(name: str, per_token: bool) -> None:
    inputs = streams(name, TOKENS)
    everything, lost = sparse(), sparse(seed=4)
    written, positions, counts = logged(inputs, doses(name, inputs, per_token=per_token, written=everything))
    real = torch.arange(positions.shape[1]) < counts[:, None]
    keep = real & ~lost.gather(1, positions)
    order = torch.argsort(~keep, dim=1, stable=True)
    start, stop = torch.zeros(BATCH, dtype=torch.long), torch.full((BATCH,), TOKENS)
    found = replay(
        RULES[name], written.at(order), positions.gather(1, order), keep.sum(1), state_of(inputs), start, stop,
        per_token=per_token, chunk_size=CHUNK,
    )  # fmt: skip
    without = token_by_token(RULES[name], inputs, doses(name, inputs, per_token=per_token, written=everything & ~lost))
    with_all = token_by_token(RULES[name], inputs, doses(name, inputs, per_token=per_token, written=everything))
    assert relative_error(without.up, found.up) < EXACT
    assert relative_error(with_all.up, found.up) > 1e-2


@pytest.mark.parametrize("per_token", [False, True], ids=["per_write", "per_token"])
@pytest.mark.parametrize("name", RULES)
def test_rows_without_writes_only_fade(name: str, per_token: bool) -> None:
    inputs = streams(name, 1)
    nothing = Written(
        inputs["keys"][:, :, :0], inputs["values"][:, :, :0], inputs["gate"][:, :, :0], inputs["gate"][:, :, :0]
    )
    start = torch.tensor([0, 5])
    empty, none = torch.zeros(BATCH, 0, dtype=torch.long), torch.zeros(BATCH, dtype=torch.long)
    initial = state_of(inputs)
    found = replay(RULES[name], nothing, empty, none, initial, start, start + 9, per_token=per_token, chunk_size=CHUNK)
    nine = {part: streams(name, 9)[part] for part in ("keys", "queries", "values")} | {"up": inputs["up"]}
    nine |= {"down": inputs["down"]} if "down" in inputs else {}
    zero = torch.zeros(BATCH, HEADS, 9)
    expected = token_by_token(RULES[name], nine, Fixed(zero, torch.ones_like(zero) if per_token else zero))
    assert relative_error(expected.up, found.up) < EXACT
    assert torch.equal(found.up, initial.up) is not per_token


def test_neighbours_under_orthogonal_keys_are_untouched() -> None:
    """Eight facts under eight orthogonal keys, one of them taken back: it reads 0, the others what they read before."""
    rule = Rule(torch.zeros(1))
    keys = torch.eye(RANK)[None, None]
    values = torch.randn(1, 1, RANK, 16, generator=torch.Generator().manual_seed(0))
    ones, start = torch.ones(1, 1, RANK), torch.zeros(1, dtype=torch.long)
    written = Written(keys, values, ones, ones)
    base = FastWeights.zeros(1, 1, RANK, 16)

    def told(index: list[int]) -> Tensor:
        chosen = torch.tensor([index])
        state = replay(
            rule, written.at(chosen), chosen, torch.tensor([len(index)]), base, start, start + RANK,
            per_token=False, chunk_size=3,
        )  # fmt: skip
        return rule.predict(keys, state)

    others = [0, 1, 2, 4, 5, 6, 7]
    before, after = told(list(range(RANK))), told(others)
    assert torch.allclose(before, values, atol=1e-6)
    assert torch.equal(after[:, :, others], before[:, :, others])
    assert float(after[:, :, 3].abs().max()) == 0.0
