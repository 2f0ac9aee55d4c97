"""Every variant is a valid configuration of the shipped recipe, and takes away what its line says."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch

from cortex_core.config import FastWeightsConfig
from cortex_core.errors import ConfigError
from cortex_core.eval.ablations import REFERENCE, VARIANTS
from cortex_core.eval.suite import Suite
from pipelines.config import RunConfig, load_config
from tests import tiny

TRAINED = [name for name, variant in VARIANTS.items() if variant.made_by == "training"]


def configured(name: str) -> RunConfig:
    return load_config("demo", VARIANTS[name].overrides)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_valid_for_the_shipped_recipe_and_differs_from_it(name: str) -> None:
    config, variant = configured(name), VARIANTS[name]
    assert variant.without and "\n" not in variant.without and len(variant.without) < 70
    changed = {
        f"{section}.{key}"
        for section in ("fast_weights", "training")
        for key, value in getattr(config, section).model_dump().items()
        if value != getattr(load_config("demo"), section).model_dump()[key]
    }
    assert changed <= set(variant.overrides)
    assert bool(changed) == (name not in (REFERENCE, "baseline"))


def test_the_reference_comes_first_and_what_needs_it_later() -> None:
    assert next(iter(VARIANTS)) == REFERENCE
    assert {name for name, variant in VARIANTS.items() if variant.made_by == "evaluation"} == {
        "mean_gate", "shuffled_surprise",
    }  # fmt: skip
    assert [name for name, variant in VARIANTS.items() if variant.made_by == "nothing"] == ["baseline"]


def test_names_are_no_folders_of_a_run() -> None:
    """The variants' folders lie in the folder of that name, beside what a run of the same name left."""
    assert not {"checkpoints", "sidecars", "evaluation"} & set(VARIANTS)


def test_the_published_constants() -> None:
    memory = configured("source_rule").fast_weights
    assert (memory.rule, memory.decay, memory.decay_per, memory.gate, memory.controller) == (
        "source", 0.95, "token", "none", True,
    )  # fmt: skip
    assert (memory.anti_hebbian_rate, memory.write_strength) == (0.01, 0.05)


def test_the_hebbian_variants_differ_in_one_term_and_are_within_the_bound() -> None:
    one, other = (configured(name).fast_weights for name in ("hebbian", "no_anti_hebbian"))
    assert one.model_copy(update={"anti_hebbian_rate": 0.0}) == other
    assert one.decay == configured(REFERENCE).fast_weights.decay and one.decay_per == "write"
    assert 0.9 < other.write_strength / -math.log(other.decay) < 1.0, "close to the bound, and below it"


@pytest.mark.parametrize("name", ["no_decay", "hebbian", "no_anti_hebbian", "source_rule"])
def test_recipes_with_other_decays_can_be_ablated_as_well(name: str) -> None:
    recipe: dict[str, Any] = {
        "fast_weights.learn_decay": True, "fast_weights.time_scales": [0.1, 1, 10], "fast_weights.rank_budget": 12,
    }  # fmt: skip
    load_config("demo", recipe | dict(VARIANTS[name].overrides))


@pytest.mark.parametrize("test", ["mean_gate", "shuffled_surprise"])
def test_the_controller_is_tested_where_there_is_one(test: str) -> None:
    with pytest.raises(ConfigError, match=f'controller_test = "{test}" needs a controller: set controller to true'):
        load_config("demo", [f"fast_weights.controller_test={test}", "fast_weights.controller=false"])


def memory_of(name: str) -> FastWeightsConfig:
    small = tiny.MEMORY.model_dump()
    changes = {key.partition(".")[2]: value for key, value in VARIANTS[name].overrides.items() if "fast_" in key}
    return FastWeightsConfig.model_validate(small | changes)


@pytest.mark.parametrize("name", TRAINED)
def test_every_variant_learns_without_a_defect(name: str) -> None:
    """A few steps and an evaluation of each: finite losses, numbers in their bounds."""
    training = tiny.training(steps=3, max_segments=2, in_window_batch_size=2)
    model = tiny.model(memory_of(name))
    learner = tiny.learner(training, model)
    losses = tiny.train(learner, tiny.batches(training), training.steps)
    assert all(math.isfinite(step["loss"]) and step["nonfinite_steps"] == 0 for step in losses)
    asked = load_config("demo", {"evaluation.gaps_tokens": [40], "evaluation.num_examples": 2}).evaluation
    asked = asked.model_copy(update={"fillers": ("text",), "batch_size": 2, "perplexity_tokens": 512})
    document = Suite(asked, tiny.vocabulary(), tiny.corpus(), tiny.PAIRS, seed=0).run(model)
    (usage,) = document["usage"]
    assert math.isfinite(document["drift"]["ratio"])
    match name:
        case "fast_off":
            assert usage["write_frac"] == 0 and document["drift"]["ratio"] == 1.0
            assert document["outcomes"][0] == document["outcomes"][1], "nothing is remembered: the bare model's answers"
        case "no_gate" | "fixed_strength" | "source_rule" | "soft_gate":
            assert usage["write_frac"] == 1.0
        case _:
            assert 0 < usage["write_frac"] <= 1


@torch.no_grad()
def test_the_hebbian_rule_can_be_switched_off_too() -> None:
    """What it holds is read in units of the write strength, which is 0 here."""
    memory = memory_of("hebbian").model_copy(update={"write_strength": 0.0})
    model, ids = tiny.model(memory, open_gates=True), torch.arange(2 * tiny.SEGMENT)[None]
    with model.memory(False):
        bare = model(input_ids=ids[:, tiny.SEGMENT :]).logits
    session = model.new_session(1)
    model.read(ids[:, : tiny.SEGMENT], session)
    assert torch.equal(model(input_ids=ids[:, tiny.SEGMENT :], session=session).logits, bare)


def test_the_list_needs_no_tensors() -> None:
    code = "import sys, cortex_core.eval.ablations; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "ray"} & {name.partition(".")[0] for name in done.stdout.split()}
