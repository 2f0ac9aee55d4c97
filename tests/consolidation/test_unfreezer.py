"""Nights that change the backbone: inside the region, and to be taken off again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cortex_core.backbone.model import Cortex
from cortex_core.backbone.prompts import Prompts, answers
from cortex_core.config import ReplayConfig, UnfreezeConfig
from cortex_core.consolidation.unfreezer import DELTAS, Unfreezer
from cortex_core.errors import DataError
from cortex_core.training.unfreezing import new_unfreezer
from tests.consolidation import sleepers
from tests.tiny import same, weights

QUICK = UnfreezeConfig(steps=8, num_modules=6, rank=4, text_windows=2)


def unfreezer(model: Cortex | None = None, config: UnfreezeConfig = QUICK) -> Unfreezer:
    return new_unfreezer(
        model or sleepers.fresh_model(), sleepers.encode, sleepers.corpus(), sleepers.book().vocabulary, sleepers.QUICK,
        ReplayConfig(), config,
    )  # fmt: skip


def said(model: Cortex) -> torch.Tensor:
    with torch.no_grad():
        return answers(model, Prompts.of([sleepers.book().question(fact) for fact in sleepers.book().facts]))


def test_what_was_read_by_day_is_in_the_backbones_deltas(tmp_path: Path) -> None:
    """Learned without slow weights, inside the region, removable to the bit, and the same when it is loaded again."""
    model = sleepers.fresh_model()
    backbone, sidecars, before = weights(model.backbone), weights(model.sidecars), said(model)
    reader = unfreezer(model)
    nights = reader.read(sleepers.stream(2))
    assert [night.kept for night in nights] == [True, True] and model.fast_weights.slow_slots == 0
    assert reader.deltas is not None and len(reader.deltas.names) == QUICK.num_modules
    drifts = {
        name: value for name, value in nights[-1].metrics.items() if name.endswith("_nats") and "loss" not in name
    }
    assert drifts and all(drift <= 0.01 for drift in drifts.values())
    told = torch.tensor([fact.value for fact in sleepers.book().facts[: 2 * sleepers.PER_DAY]])
    change = (said(model) - before).log_softmax(-1)[torch.arange(len(told)), told]
    assert float((said(model).log_softmax(-1) - before.log_softmax(-1))[torch.arange(len(told)), told].mean()) > 1.0
    assert change.isfinite().all()
    assert same(weights(model.backbone), backbone) and same(weights(model.sidecars), sidecars)

    reader.save(tmp_path)
    after = said(model)
    reader.deltas.remove()
    assert torch.equal(said(model), before), "without the deltas it is what it was"
    again = unfreezer()
    again.load(tmp_path)
    assert torch.equal(said(again.model), after) and again.num_nights == 2
    (tmp_path / DELTAS).unlink()
    with pytest.raises(DataError, match=r"backbone-deltas\.safetensors: is missing after 2 nights"):
        unfreezer().load(tmp_path)


def test_a_night_goes_on_from_its_files_as_it_would_have(tmp_path: Path) -> None:
    undisturbed, tokens, cut = unfreezer(), sleepers.stream(2), sleepers.DAY + 1
    undisturbed.read(tokens)
    first = unfreezer()
    first.read(tokens[:cut])
    first.save(tmp_path)
    second = unfreezer()
    second.load(tmp_path)
    second.read(tokens[cut:])
    assert undisturbed.deltas is not None and second.deltas is not None
    assert undisturbed.deltas.names == second.deltas.names
    for name, value in undisturbed.deltas.values().items():
        torch.testing.assert_close(second.deltas.values()[name], value, atol=2e-3, rtol=2e-2)


def test_a_region_without_room_lets_nothing_be_learned() -> None:
    reader = unfreezer(config=QUICK.model_copy(update={"max_text_nats": 0.0, "steps": 2, "max_backtracks": 1}))
    reader._region = dict(reader._region)
    before = said(reader.model)
    (night,) = reader.read(sleepers.stream(1))
    assert not night.kept and reader.num_undone == 1 and reader.num_rollbacks > 0
    assert torch.equal(said(reader.model), before)
    assert len(reader.buffer) == 0
