"""Which modules are unfrozen: the Fisher numbers against finite differences and KL, and a choice that can be read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cortex_core.backbone.low_rank import LowRankDeltas, layer_of, linear_modules
from cortex_core.backbone.model import Cortex
from cortex_core.config import UnfreezeConfig
from cortex_core.consolidation.guard import DriftGuard
from cortex_core.consolidation.select import Candidate, candidates, chosen_deltas, table
from cortex_core.consolidation.sleep import distillation_loss
from cortex_core.errors import ConfigError
from tests.backbone.families import CONFIGS, with_memory
from tests.consolidation.unfreeze_scenes import facts, text
from tests.tiny import same, weights

CONFIG = UnfreezeConfig(rank=2, num_modules=3)


def found(model: Cortex, config: UnfreezeConfig = CONFIG, windows: int = 3) -> list[Candidate]:
    return candidates(model, facts(4)[0], text(windows), config)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_has_a_best_first_table(family: str) -> None:
    model = with_memory(family)
    before = weights(model)
    rows = found(model)
    assert {row.module for row in rows} == set(linear_modules(model.backbone))
    assert [row.ratio for row in rows] == sorted((row.ratio for row in rows), reverse=True)
    assert [row.chosen for row in rows] == [True] * 3 + [False] * (len(rows) - 3)
    assert all(row.text > 0 and row.ratio == pytest.approx(row.lessons / row.text) for row in rows)
    assert same(weights(model), before)
    assert all(value.grad is None for value in model.parameters())
    assert not any(module._forward_hooks for module in model.backbone.modules())
    assert rows == found(model)


def test_the_lessons_number_is_the_mean_of_squared_gradients() -> None:
    """By hand, lesson by lesson, for one module."""
    model, (lessons, _) = with_memory("llama"), facts(4)
    name = "model.layers.1.mlp.down_proj"
    rows = {row.module: row for row in found(model)}
    deltas = LowRankDeltas(model.backbone, [name], CONFIG.rank, CONFIG.scale, CONFIG.seed).attach(model)
    up = deltas.up[0].requires_grad_(True)
    squares = 0.0
    for row in range(4):
        loss = distillation_loss(model, lessons.at(torch.tensor([row])), 1)
        squares += float(torch.autograd.grad(loss, up)[0].square().sum())
    assert rows[name].lessons == pytest.approx(squares / 4, rel=1e-3)


def test_the_text_number_predicts_the_drift_of_a_small_random_step() -> None:
    """KL per token of a step of length e in a random direction of n dimensions: F e² / 2n on average. Labels are drawn,
    so the estimate is noisy; the order of magnitude is what a choice is made by."""
    model = with_memory("llama", open_gate=False)
    name, windows = "model.layers.2.mlp.down_proj", text(24)
    expected = {row.module: row.text for row in candidates(model, facts(4)[0], windows, CONFIG)}[name]
    deltas = LowRankDeltas(model.backbone, [name], CONFIG.rank, CONFIG.scale, CONFIG.seed).attach(model)
    guard, drifts = DriftGuard(windows, 1.0), []
    up: Tensor = deltas.up[0]
    for seed in range(24):
        step = torch.randn(up.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            up.copy_(0.3 * step / step.norm())
        drifts.append(guard.drift(model))
    assert sum(drifts) / 24 == pytest.approx(expected * 0.09 / (2 * up.numel()), rel=0.35)


def test_a_choice_keeps_to_layers_patterns_and_budget() -> None:
    model = with_memory("llama")
    config = CONFIG.model_copy(update={"layers": (0, 2), "modules": ("*.mlp.*",), "num_modules": 4})
    rows = found(model, config)
    assert len(rows) == 6
    assert {layer_of(row.module) for row in rows} == {0, 2}
    deltas = chosen_deltas(model, rows, config)
    chosen = {row.module for row in rows if row.chosen}
    assert set(deltas.names) == chosen
    assert list(deltas.names) == [name for name in linear_modules(model.backbone) if name in chosen]
    assert deltas.rank == 2
    assert not deltas.active
    many = found(model, config.model_copy(update={"num_modules": 99}))
    assert all(row.chosen for row in many)


def test_where_nothing_is_learned_nothing_is_gained() -> None:
    """Lessons that the model already answers as taught: no gradient anywhere, names decide."""
    model = with_memory("llama")
    lessons, _ = facts(4, sure=0.0)
    flat = model.backbone.get_output_embeddings()
    with torch.no_grad():
        flat.weight.zero_()  # type: ignore[union-attr]
    rows = candidates(model, lessons, text(2), CONFIG)
    assert all(row.ratio == 0.0 for row in rows)
    assert [row.module for row in rows] == sorted(row.module for row in rows)


def test_a_table_for_people() -> None:
    lines = table([Candidate("layers.1.up", 0.5, 0.25, 2.0, True), Candidate("b", 0.0, 0.5, 0.0, False)]).splitlines()
    assert lines[0].split() == ["module", "lessons", "text", "ratio"]
    assert lines[1].split() == ["*", "layers.1.up", "0.5", "0.25", "2"]
    assert lines[2].split() == ["b", "0", "0.5", "0"]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("how", ["no lessons", "no text", "pattern", "layer"])
def test_nothing_to_choose_from_is_refused(how: str) -> None:
    model, (lessons, _) = with_memory("llama"), facts(4)
    windows, config, message = text(2), CONFIG, "give some of both"
    match how:
        case "no lessons":
            lessons = lessons.at(torch.zeros(4, dtype=torch.bool))
        case "no text":
            windows = text(0)
        case "pattern":
            config, message = CONFIG.model_copy(update={"modules": ("*.nope",)}), r"'\*\.nope' matches no linear module"
        case "layer":
            config, message = CONFIG.model_copy(update={"layers": (9,)}), r"layers = \[9\]: LlamaForCausalLM has layers"
    with pytest.raises(ConfigError, match=message):
        candidates(model, lessons, windows, config)
