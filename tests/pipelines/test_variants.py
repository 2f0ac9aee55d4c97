"""The plan of an ablation: which variants, with which configuration, and one line for what cannot be planned."""

from __future__ import annotations

from pathlib import Path

import pytest

from cortex_core.errors import ConfigError
from cortex_core.eval.ablations import REFERENCE, VARIANTS
from pipelines.config import load_config
from pipelines.preflight import check
from pipelines.variants import choose, plan


def test_without_a_list_all_variants_are_planned() -> None:
    planned = plan("demo", ["training.steps=7", "name=mine"])
    assert list(planned.variants) == list(VARIANTS)
    assert planned.config == load_config("demo", ["training.steps=7", "name=mine"])


def test_the_reference_is_always_there_and_the_order_is_that_of_the_list() -> None:
    assert choose("source_rule, baseline,fast_off,fast_off") == [REFERENCE, "baseline", "fast_off", "source_rule"]
    assert choose(REFERENCE) == [REFERENCE]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_the_recipe_with_its_overrides_in_a_folder_of_its_own(name: str) -> None:
    given = ["training.steps=7", "evaluation.num_examples=9", "out_dir=out"]
    config = plan("demo", given, name).variants[name]
    folder = REFERENCE if name == "baseline" else name
    place = {"name": folder, "out_dir": "out/demo", "tracking.uri": f"sqlite:///{Path('out').absolute()}/mlflow.db"}
    typed = dict(text.split("=") for text in given)
    expected = load_config(
        "demo",
        {"training.steps": int(typed["training.steps"]), "evaluation.num_examples": 9}
        | dict(VARIANTS[name].overrides)
        | place,
    )
    assert config == expected
    assert config.run_dir == Path("out/demo").absolute() / folder


def test_a_tracking_server_is_kept() -> None:
    planned = plan("demo", ["tracking.uri=http://tracker:5000"], "fast_off")
    assert {config.tracking.uri for config in planned.variants.values()} == {"http://tracker:5000"}


def test_every_variant_of_the_demo_passes_the_checks(tmp_path: Path) -> None:
    for config in plan("demo", [f"out_dir={tmp_path}", "cluster.num_workers=1"]).variants.values():
        check(config)


@pytest.mark.parametrize(
    ("names", "overrides", "parts"),
    [
        ("fast_of", [], ["--variants: fast_of: no such variant. There are: cortex, baseline, fast_off,", "Did you mean fast_off?"]),
        ("nothing_like_it", [], ["nothing_like_it: no such variant. There are: "]),
        (" , ", [], ["names no variant. There are: cortex"]),
        ("no_decay", ["fast_weights.decay=0.9"],
         ["fast_weights.decay=0.9: variant no_decay sets fast_weights.decay to 1.0", "into a recipe", "--variants cortex"]),
        ("no_gate,soft_gate", ["training.sparsity_weight=1"],
         ["training.sparsity_weight=1: variant no_gate sets training.sparsity_weight to 0.0", "--variants cortex,soft_gate"]),
        ("mean_gate,no_gate", ["fast_weights.controller=false"],
         ['variant mean_gate: fast_weights.controller_test = "mean_gate" needs a controller', "--variants cortex,no_gate"]),
        ("no_decay", ["training.steps=0"], ["training.steps = 0: must be at least 1"]),
        ("no_decay", ["sidecars=runs/a/sidecars"], ["sidecars = runs/a/sidecars: must be null: cortex ablate compares"]),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_cannot_be_planned_gets_one_line(names: str, overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        plan("demo", overrides, names)
    (line,) = str(refused.value).splitlines()
    assert [part for part in parts if part not in line] == [], line


def test_an_override_collides_only_with_variants_that_are_run() -> None:
    planned = plan("demo", ["fast_weights.decay=0.9"], "fast_off,no_gate")
    assert {config.fast_weights.decay for config in planned.variants.values()} == {0.9}


def test_a_recipe_is_changed_by_variants_without_a_question(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text("name = 'mine'\n[fast_weights]\ndecay = 0.9\n", encoding="utf-8")
    assert plan(recipe, [], "no_decay").variants["no_decay"].fast_weights.decay == 1.0


def test_a_variant_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text("name = 'mine'\n[fast_weights]\ncontroller = false\n", encoding="utf-8")
    with pytest.raises(
        ConfigError,
        match=r"variant no_controller: takes nothing away, the recipe has fast_weights\.controller = false\. Leave it out: --variants cortex,no_gate$",
    ):
        plan(recipe, [], "no_controller,no_gate")
    assert not plan(recipe, [], "no_gate").config.fast_weights.controller


def test_a_recipe_beyond_a_variants_bound_is_told_with_its_name(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        "name = 'mine'\n[fast_weights]\nrank_budget = 8.0\nlearn_decay = true\ncontroller_test = 'mean_gate'\n",
        encoding="utf-8",
    )
    assert plan(recipe, [], "source_rule").variants["source_rule"].fast_weights.rank_budget is None
    with pytest.raises(
        ConfigError,
        match=r"variant no_controller: fast_weights.controller_test .* needs a controller.* Or leave it out: --variants cortex",
    ):
        plan(recipe, [], "no_controller")
