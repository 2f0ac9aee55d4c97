"""Addresses of slow weights, fitted to sleep's questions: what other text stands before one hardly moves them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cortex_core import files
from cortex_core.backbone.model import Cortex
from cortex_core.backbone.sidecar_files import WEIGHTS
from cortex_core.consolidation import spread
from cortex_core.consolidation.sleeper import SCHEMA, SLOW
from cortex_core.tasks.filler import TextFiller
from tests import tiny
from tests.consolidation import sleepers

QUESTIONS = [sleepers.encode(text) for text in (" recall", "\n recall")]


@pytest.fixture
def few_cues(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quick fit, and a poor one."""
    monkeypatch.setattr(spread, "CUES", 32)


def grown() -> Cortex:
    model = sleepers.fresh_model()
    model.grow_slow_weights(4096, 32)
    return model


@pytest.fixture(scope="module")
def fitted() -> Cortex:
    model = grown()
    spread.spread_addresses(model, QUESTIONS)
    return model


@torch.no_grad()
def asked(model: Cortex, lead: int) -> Tensor:
    """Slots' strengths, [200, slots], at the ends of questions about 200 tokens behind so much real text."""
    filler = TextFiller(sleepers.corpus(), "held_out")
    rows = [
        [*(filler.tokens((cue, lead), lead).tolist() if lead else []), *QUESTIONS[0], cue] for cue in range(300, 500)
    ]
    (queries,) = spread._queries(model, torch.tensor(rows))
    (sidecar,) = model.sidecars_by_layer.values()
    assert sidecar.slow is not None
    return torch.zeros(len(rows), 4096).scatter(1, *sidecar.slow.features(queries))


def overlaps(model: Cortex) -> tuple[float, float]:
    """Of one question at once and behind 40 tokens, mean; of two, root mean square."""
    both = asked(model, 0) @ asked(model, 40).T
    return float(both.diagonal().mean()), float(both.clone().fill_diagonal_(0).square().mean().sqrt())


def test_questions_overlap_with_themselves_more_and_with_others_less(fitted: Cortex) -> None:
    same, other = overlaps(grown())
    same_after, other_after = overlaps(fitted)
    assert same_after > same + 0.1 and other_after < 0.8 * other


def test_what_is_told_is_found_where_it_will_be_asked_for(fitted: Cortex) -> None:
    """What is read is compared with what is known under the key that it is written with. Told with words that no fit
    has seen; with those of a fit to questions alone, the overlap would be .60."""
    told = sleepers.encode(" remember")
    filler = TextFiller(sleepers.corpus(), "held_out")
    lines = torch.tensor([[*filler.tokens((cue, 60), 60).tolist(), *told, cue, 7] for cue in range(300, 500)])
    (sidecar,) = fitted.sidecars_by_layer.values()
    assert sidecar.slow is not None
    keys = list[Tensor]()
    hook = sidecar.addresses.register_forward_hook(lambda module, inputs, result: keys.append(result[0][:, :, -1]))
    with torch.no_grad(), hook:
        fitted(input_ids=lines)
    there = torch.zeros(len(lines), 4096).scatter(1, *sidecar.slow.features(keys[0]))
    assert float((there * asked(fitted, 40)).sum(1).mean()) > 0.8


@pytest.mark.usefixtures("few_cues")
def test_every_fit_is_the_same_and_changes_nothing_else() -> None:
    one, other = grown(), grown()
    untouched = {name: value.clone() for name, value in one.state_dict().items()}
    for model in (one, other):
        spread.spread_addresses(model, QUESTIONS)
    changed = {name for name, value in one.state_dict().items() if not torch.equal(value, untouched[name])}
    assert {name.removeprefix("sidecars.") for name in changed} == set(spread.fitted(one))
    for mine, theirs in zip(spread.fitted(one).values(), spread.fitted(other).values(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.usefixtures("few_cues")
def test_questions_longer_than_a_segment_are_left_out() -> None:
    one, other = grown(), grown()
    spread.spread_addresses(one, [QUESTIONS[0], QUESTIONS[1]])
    spread.spread_addresses(other, [[5] * other.segment_tokens, *QUESTIONS])
    for mine, theirs in zip(spread.fitted(one).values(), spread.fitted(other).values(), strict=True):
        assert torch.equal(mine, theirs)
    bare = grown()
    spread.spread_addresses(bare, [[5] * bare.segment_tokens])
    assert all(torch.equal(value, spread.unfitted(bare)[name]) for name, value in spread.fitted(bare).items())


def test_a_fit_goes_with_the_slow_weights_into_their_files(tmp_path: Path) -> None:
    model = sleepers.fresh_model()
    reader = sleepers.sleeper(model)
    reader.save(tmp_path)
    model.save_pretrained(tmp_path / "sidecars")
    other = sleepers.sleeper()
    for value in spread.fitted(other.model).values():
        value.normal_()
    other.load(tmp_path)
    again = Cortex.from_pretrained(sleepers.NAME, sidecars=tmp_path / "sidecars", dtype="float32")
    for name, value in spread.fitted(model).items():
        assert not torch.equal(value, spread.unfitted(model)[name])
        assert torch.equal(value, spread.fitted(other.model)[name])
        assert torch.equal(value, spread.fitted(again)[name])


@pytest.mark.parametrize("part", ["sleeper", "sidecars"])
def test_files_from_before_there_was_a_fit_are_read_without_one(tmp_path: Path, part: str) -> None:
    model = sleepers.fresh_model()
    reader = sleepers.sleeper(model)
    if part == "sleeper":
        reader.save(tmp_path)
        tensors, notes = files.read(tmp_path / SLOW, SCHEMA, "slow weights")
        files.write(tmp_path / SLOW, SCHEMA, {n: t for n, t in tensors.items() if n.endswith("values")}, notes)
        reader.load(tmp_path)
    else:
        model.save_pretrained(tmp_path)
        older = {n: t for n, t in load_file(tmp_path / WEIGHTS).items() if not n.endswith(("centre", "spread"))}
        save_file(older, tmp_path / WEIGHTS)
        model = Cortex.from_pretrained(sleepers.NAME, sidecars=tmp_path, dtype="float32")
    assert all(torch.equal(value, spread.unfitted(model)[name]) for name, value in spread.fitted(model).items())


def test_addresses_are_those_of_a_whole_forward_pass() -> None:
    """Of every layer, of the last one too, whose read the fit leaves out."""
    model = tiny.model(tiny.MEMORY.model_copy(update={"layers": (0, 1)}), open_gates=True)
    rows = torch.randint(40, (70, 9), generator=torch.Generator().manual_seed(0))
    seen: dict[int, Tensor] = {}
    hooks = [
        sidecar.addresses.register_forward_hook(lambda _, inputs, result, at=at: seen.update({at: result[1][:, :, -1]}))
        for at, sidecar in enumerate(model.sidecars_by_layer.values())
    ]
    with torch.no_grad():
        model(input_ids=rows, session=model.new_session(len(rows)))
    for hook in hooks:
        hook.remove()
    found = spread._queries(model, rows)
    assert len(found) == len(seen) > 1
    for at, queries in enumerate(found):
        torch.testing.assert_close(queries, seen[at], rtol=1e-5, atol=1e-6)
