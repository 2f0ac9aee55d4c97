"""What a sweep will run, resolved before anything is imported; and every study that ships."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest

from cortex_core.errors import ConfigError, DataError
from pipelines.config import RunConfig
from pipelines.explain import knobs
from pipelines.sweep_plan import plan, read, trial_config
from pipelines.toml_text import dump_toml
from tests import tiny
from tune_spaces.study import SHIPPED, Choice, Real, Whole, domain

KNOWN = {knob.name for knob in knobs(RunConfig)}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_study_that_ships_can_be_run(name: str) -> None:
    study = import_module(f"tune_spaces.{name}").STUDY
    assert study.name == name and set(study.space) <= KNOWN and set(study.overrides) <= KNOWN
    planned = plan(name)
    assert planned.config.name == name and planned.config.cluster.num_workers == 1
    assert planned.recipe.training.steps != planned.config.training.steps, "the best values go into the whole recipe"
    corners = [{setting: of.grid(2)[end] for setting, of in study.space.items()} for end in (0, -1)]
    for corner in corners:
        trial = trial_config(planned.config, "a", corner)
        assert all(getattr(getattr(trial, s.partition(".")[0]), s.partition(".")[2]) == v for s, v in corner.items())


@pytest.mark.parametrize("name", SHIPPED)
def test_every_range_says_why(name: str) -> None:
    module = import_module(f"tune_spaces.{name}")
    said = str(module.__doc__)
    for setting in module.STUDY.space:
        assert f"`{setting.partition('.')[2]}`" in said or setting.endswith("learning_rate"), setting


def test_a_setting_that_is_given_is_not_varied() -> None:
    planned = plan("fast_weights", ["fast_weights.rank=8", "name=eight"])
    assert "fast_weights.rank" not in planned.study.space and planned.config.fast_weights.rank == 8
    assert planned.config.name == "eight" and planned.best({"fast_weights.decay": 0.9}).name == "eight-best"
    assert planned.best({"fast_weights.decay": 0.9}).fast_weights.rank == 8


def test_a_population_varies_what_weights_outlive() -> None:
    planned = plan("sparsity", ["fast_weights.dead_zone=0.4"], search="pbt", trials=4)
    assert len(planned.study.space) == 3 and not planned.stop_early and planned.identity()["search"] == "pbt"
    assert plan("learning", search="pbt").study.space == plan("learning").study.space


def test_a_grid_has_a_trial_per_point() -> None:
    assert plan("fast_weights", search="grid").study.num_trials == 4 * 4 * 3 * 3


def test_trials_lie_in_the_sweeps_folder() -> None:
    planned = plan("sparsity", ["out_dir=/somewhere"])
    trial = trial_config(planned.config, "0a1b", {"training.filler_windows": 1})
    assert (
        trial.run_dir == Path("/somewhere/sparsity/trials/0a1b") and trial.tracking_uri == planned.config.tracking_uri
    )


def test_what_a_sweep_is_does_not_depend_on_where_it_runs() -> None:
    one, other = plan("learning"), plan("learning", ["cluster.cpus_per_worker=0.5", "out_dir=elsewhere"])
    assert one.identity() == other.identity() == json.loads(json.dumps(one.identity()))
    assert one.identity() != plan("learning", trials=3).identity()
    assert one.identity() != plan("learning", ["training.steps=60"]).identity()


@pytest.mark.parametrize(
    ("study", "more", "said"),
    [
        ("fastweights", {}, r"fastweights: no such study\. .*Did you mean fast_weights\?"),
        ("learning", {"overrides": ["validation.every_steps=0"]}, r"validation\.every_steps = 0: must be 1 to 80"),
        ("learning", {"overrides": ["cluster.num_workers=0"]}, r"cluster\.num_workers = 0: .* Set cluster\.num_workers=1"),
        ("learning", {"overrides": ["sidecars=runs/a/sidecars"]}, r"sidecars = runs/a/sidecars: must be null: cortex tune compares"),
        ("learning", {"overrides": ["stage=sleep", "sidecars=runs/a/sidecars"]}, r'stage = "sleep": must be "memory": .*such as demo'),
        ("learning", {"overrides": ["rank"]}, r"'rank' is not an override: write name=value"),
        ("sparsity", {"search": "pbt"}, r"study sparsity: fast_weights\.dead_zone: pbt changes settings while a run goes on, .*this one\. "
            r"Give a value for all trials, e\.g\. fast_weights\.dead_zone=0\.2, or choose another --search"),
        ("fast_weights", {"search": "pbt"}, r"fast_weights\.rank, fast_weights\.decay, .*these\. .* e\.g\. fast_weights\.rank=4"),
        ("learning", {"search": "pbt", "trials": 1}, r"--trials 1: must be 2 or more with pbt"),
        ("learning", {"search": "pbt", "overrides": ["validation.every_steps=80"]}, r"every_steps = 80: must be below 80"),
        ("learning", {"search": "pbt", "overrides": ["cluster.storage_path=/shared"]}, r"storage_path = /shared: with pbt"),
        ("learning", {"trials": 5, "search": "grid"}, r"--trials 5: a grid of this study has 243"),
        ("sparsity", {"overrides": ["fast_weights.saturation=0.6"]}, r"sparsity, fast_weights\.dead_zone = 0\.7: .*saturation"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_in_a_line(study: str, more: dict, said: str) -> None:
    with pytest.raises((ConfigError, DataError), match=said) as error:
        plan(study, **more)
    assert "\n" not in str(error.value)


def test_nothing_left_to_vary_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[space]\nfast_weights.rank = [4, 8]\n")
    with pytest.raises(ConfigError, match="every setting that it varies is set to one value"):
        plan(str(file), ["fast_weights.rank=8"])


def test_a_study_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(dump_toml(tiny.run_config(tmp_path, cluster__num_workers=1)))
    file = tmp_path / "depth.toml"
    file.write_text(f'''about = "mine"
recipe = "{tmp_path / "mine.toml"}"
num_trials = 5
search = "random"
overrides = {{ training.steps = 8, "validation.every_steps" = 4 }}
[space]
fast_weights.rank = [4, 8]
"training.filler_windows" = {{ low = 0, high = 3 }}
[space.optimizer]
learning_rate = {{ low = 1e-3, high = 1e-2, log = true }}
''')
    planned = plan(str(file))
    assert planned.study.space == {
        "fast_weights.rank": Choice((4, 8)), "training.filler_windows": Whole(0, 3), "optimizer.learning_rate": Real(1e-3, 1e-2, log=True),
    }  # fmt: skip
    assert planned.study.num_trials == 5 and planned.study.search == "random" and planned.config.name == "depth"
    assert planned.config.training.steps == 8 and planned.config.backbone == planned.recipe.backbone


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[space", "not valid TOML"),
        ("about = 'x'", r"has no \[space\]"),
        ("sapce = 1\n[space]\nseed = [1, 2]", "sapce: no such key"),
        ("[space]\nfast_weights.rank = 8", "is no range"),
        ("[space]\nfast_weights.rank = [8]", "must be two values or more"),
        ("[space]\nfast_weights.rank = {low = 8, high = 4}", "low must be below high"),
        ("[space]\nfast_weights.rank = {low = 0, high = 4, log = true}", "low must be above 0"),
        ("[space]\nfast_weights.decay = {low = 0.1, high = nan}", "is no range"),
        ("[space]\nfast_weights.decay = {low = 0.1, hihg = 0.2, high = 1}", "is no range"),
        ("num_trials = 'x'\n[space]\nseed = [1, 2]", "num_trials = 'x': must be int"),
        ("search = 'best'\n[space]\nseed = [1, 2]", "search = 'best': must be tpe, random, grid or pbt"),
    ],
)
def test_a_study_that_cannot_be_read_is_refused_in_a_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said) as error:
        read(file)
    assert str(error.value).startswith(f"{file}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("setting", "said"),
    [("fast_weights.rnak", r"no such setting\. Did you mean fast_weights\.rank\?"), ("evaluation.num_examples", "cannot be varied")],
)  # fmt: skip
def test_what_cannot_be_varied_is_refused(tmp_path: Path, setting: str, said: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(f"[space]\n{setting} = [2, 4]\n")
    with pytest.raises(ConfigError, match=said):
        plan(str(file))


def test_grids_go_from_end_to_end() -> None:
    assert Real(1.0, 100.0, log=True).grid(3) == pytest.approx([1, 10, 100])
    assert Real(0.0, 1.0).grid(3) == [0.0, 0.5, 1.0]
    assert Whole(0, 4).grid(3) == [0, 2, 4] and Whole(0, 1).grid(3) == [0, 1]
    assert Choice(("a", "b")).grid(7) == ["a", "b"]
    assert domain("x", {"low": 1, "high": 2.5}) == Real(1.0, 2.5)
