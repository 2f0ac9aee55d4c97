"""Runs that begin with a memory: it is theirs whether or not the settings say so, and what contradicts it is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cortex_core.backbone.load import in_assets
from cortex_core.backbone.sidecar_files import read
from cortex_core.config import FastWeightsConfig
from cortex_core.errors import ConfigError, DataError
from pipelines import cli
from pipelines.config import RunConfig, load_config, located
from pipelines.trained import with_its_memory
from tests.pipelines.living_scenes import SIDECARS, run_config

SHIPPED = read(in_assets(SIDECARS)).fast_weights


def beginning(sidecars: str = SIDECARS, **changes: object) -> RunConfig:
    settings = {"sidecars": sidecars, "backbone.segment_tokens": 256}
    return load_config(overrides=settings | {name.replace("__", "."): value for name, value in changes.items()})


def test_a_run_that_begins_with_sidecars_has_their_memory(tmp_path: Path) -> None:
    shutil.copytree(in_assets(SIDECARS), tmp_path / "mine")
    assert FastWeightsConfig() != SHIPPED
    for sidecars in (SIDECARS, str(tmp_path / "mine")):
        assert with_its_memory(beginning(sidecars)).fast_weights == SHIPPED
    given = beginning(fast_weights=SHIPPED.model_dump())
    assert with_its_memory(given) == given
    new = load_config()
    assert with_its_memory(new) is new


def test_settings_that_contradict_the_sidecars_are_one_line() -> None:
    with pytest.raises(ConfigError, match=rf"^fast_weights\.rank = 7: must be {SHIPPED.rank}, as sidecars = builtin"):
        with_its_memory(beginning(fast_weights=SHIPPED.model_dump() | {"rank": 7}))
    with pytest.raises(
        ConfigError, match=r"^backbone\.segment_tokens = 128: must be 256, as sidecars = builtin:stdlib"
    ):
        with_its_memory(beginning(backbone__segment_tokens=128))


@pytest.mark.parametrize("content", [None, "{", "[]", '{"fast_weights": {"rank": -1}, "segment_tokens": 256}'])
def test_a_folder_without_sidecars(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "cortex.json").write_text(content)
    with pytest.raises(
        DataError, match=r"^sidecars = .*: no sidecars can be read there \(.*\)\. Give a folder"
    ) as error:
        with_its_memory(beginning(str(tmp_path)))
    assert "\n" not in str(error.value)


def test_the_command_says_so_before_it_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "dream", f"sidecars={tmp_path}", f"out_dir={tmp_path / 'runs'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no sidecars can be read there" in line and not (tmp_path / "runs").exists()


def test_sidecars_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert located(beginning("runs/x/sidecars")).sidecars == str(tmp_path / "runs/x/sidecars")
    assert located(beginning("~/x")).sidecars == str(tmp_path / "home/x")
    assert located(beginning()).sidecars == SIDECARS and located(load_config()).sidecars is None


def test_a_life_needs_a_memory_and_room_for_its_dreams() -> None:
    with pytest.raises(ConfigError, match=r"life\.beside_training = true: needs a memory that can write already\. Set"):
        load_config(overrides=["life.beside_training=true"])
    changes = {"sleep__dream_frac": 0.5, "sleep__dreams_per_night": 300}
    with pytest.raises(ConfigError, match=r"sleep\.dreams_per_night = 300: must be at most 256, dream_actors\.queue"):
        run_config(**changes)
    assert not run_config(sleep__dreams_per_night=300).dreams_beside_training
    assert run_config(**changes, dream_actors__queue_items=300).dreams_beside_training


def test_the_recipe_dream_is_a_life_with_dreams_on_two_workers() -> None:
    config = with_its_memory(load_config("dream"))
    assert config.dreams_beside_training and config.cluster.num_workers == 2 and config.sharding.stage == 3
    assert config.fast_weights == SHIPPED
    document = json.loads(config.model_dump_json())
    assert RunConfig.model_validate(document) == config
