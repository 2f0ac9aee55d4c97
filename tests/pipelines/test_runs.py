"""A run's folder: what a second start under the same name does, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cortex_core.errors import ConfigError, DataError
from cortex_core.training.checkpoint import COUNTERS, TENSORS
from pipelines.config import CONFIG_FILE, SIDECARS_FOLDER, RunConfig, load_config
from pipelines.runs import BEFORE_LAST, LAST, RAY_RECORD, STATE_FILE, Run, locked, open_run


def config(folder: Path, **overrides: object) -> RunConfig:
    """Settings by name, with two underscores for the dot."""
    named = {name.replace("__", "."): value for name, value in overrides.items()}
    return load_config(overrides={"out_dir": str(folder), "name": "mine", **named})


def started(folder: Path, state: str = "KILLED", **overrides: object) -> Run:
    """A run that got as far as its second checkpoint."""
    run, _ = open_run(config(folder, **overrides))
    for step in (50, 100):
        left = run.checkpoints / run.storage_name / f"checkpoint_{step}"
        left.mkdir(parents=True)
        save_file({"weights": torch.zeros(2)}, left / TENSORS)
        (left / COUNTERS).write_text(json.dumps({"step": step}))
    on_record = [{"checkpoint_dir_name": f"checkpoint_{step}"} for step in (50, 100)]
    (run.checkpoints / run.storage_name / RAY_RECORD).write_text(json.dumps({"checkpoint_results": on_record}))
    return run.update(state=state, mlflow_run_id="abc")


def on_disk(folder: Path) -> dict[str, object]:
    return json.loads((folder / "mine" / STATE_FILE).read_text())


def test_a_new_run_has_a_folder_with_its_configuration(tmp_path: Path) -> None:
    run, resumed = open_run(config(tmp_path / "deep" / "er", seed=5))
    assert not resumed
    assert run == Run(tmp_path / "deep" / "er" / "mine", 0, "RUNNING", None)
    assert load_config(run.folder / CONFIG_FILE) == config(tmp_path / "deep" / "er", seed=5)
    assert on_disk(tmp_path / "deep" / "er") == {"attempt": 0, "state": "RUNNING", "mlflow_run_id": None}
    assert (run.storage_name, run.checkpoints) == ("attempt-000", run.folder / "checkpoints")


@pytest.mark.parametrize("state", ["KILLED", "RUNNING"])
def test_what_did_not_finish_is_resumed(tmp_path: Path, state: str) -> None:
    before = started(tmp_path, state)
    run, resumed = open_run(config(tmp_path))
    assert resumed
    assert run == Run(before.folder, 0, "RUNNING", "abc")
    assert (run.checkpoints / run.storage_name).is_dir(), "the checkpoints are gone"
    assert on_disk(tmp_path) == {"attempt": 0, "state": "RUNNING", "mlflow_run_id": "abc"}


def test_what_finished_is_done_again_from_the_start(tmp_path: Path) -> None:
    before = started(tmp_path, "FINISHED")
    (before.folder / "report.html").write_text("an earlier report")
    run, resumed = open_run(config(tmp_path, training__steps=7))
    assert not resumed
    assert run == Run(before.folder, 1, "RUNNING", None) and run.storage_name == "attempt-001"
    assert run.newest_checkpoint() is None and not (run.checkpoints / before.storage_name).exists()
    assert load_config(run.config_file).training.steps == 7
    assert (run.folder / "report.html").read_text() == "an earlier report", "replaced only at the end"
    run.update(state="KILLED")
    run, resumed = open_run(config(tmp_path, training__steps=7))
    assert resumed and run.attempt == 1


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"training__steps": 7}, "training.steps"),
        ({"fast_weights__rank": 8, "fast_weights__decay": 0.5}, "fast_weights.rank, fast_weights.decay"),
        ({"seed": 3}, "seed"),
        ({"backbone__name": "other"}, "backbone.name"),
        ({"data__max_bytes": 5000}, "data.max_bytes"),
        ({"optimizer__clip_norm": 2.0}, "optimizer.clip_norm"),
        ({"tasks__num_pairs": 2}, "tasks.num_pairs"),
        ({"cluster__storage_path": "/elsewhere"}, "cluster.storage_path"),
    ],
)
def test_an_unfinished_run_is_not_continued_with_other_settings(
    tmp_path: Path, changed: dict[str, object], named: str
) -> None:
    before = started(tmp_path)
    with pytest.raises(ConfigError) as error:
        open_run(config(tmp_path, **changed))
    line = str(error.value)
    assert line.startswith(f"{named} differs from the unfinished run in {before.folder}: ") and "\n" not in line
    assert "name=" in line and "remove the folder" in line
    assert load_config(before.config_file) == config(tmp_path), "the configuration was overwritten"
    assert on_disk(tmp_path)["state"] == "KILLED"
    _, resumed = open_run(config(tmp_path))
    assert resumed


@pytest.mark.parametrize(
    "changed",
    [
        {"cluster__num_workers": 1, "cluster__max_failures": 9}, {"tracking__experiment": "other"},
        {"evaluation__gaps_tokens": [0, 512]}, {"sharding__stage": 0},
    ],
)  # fmt: skip
def test_what_does_not_decide_what_is_learned_may_change(tmp_path: Path, changed: dict[str, object]) -> None:
    started(tmp_path)
    run, resumed = open_run(config(tmp_path, **changed))
    assert resumed
    assert load_config(run.config_file) == config(tmp_path, **changed), "the new settings are those on record"


def test_settings_may_be_corrected_before_the_first_checkpoint(tmp_path: Path) -> None:
    before, _ = open_run(config(tmp_path, training__steps=9))
    before.update(state="KILLED", mlflow_run_id="abc")
    run, resumed = open_run(config(tmp_path, training__steps=7))
    assert not resumed and run == Run(before.folder, 1, "RUNNING", None)
    assert load_config(run.folder / CONFIG_FILE).training.steps == 7


def test_what_is_published_keeps_its_configuration_until_it_is_replaced(tmp_path: Path) -> None:
    """Or `cortex evaluate` would read the sidecars of one run with the settings of another."""
    before = started(tmp_path, "FINISHED")
    (before.folder / SIDECARS_FOLDER).mkdir()
    run, _ = open_run(config(tmp_path, fast_weights__rank=8))
    assert load_config(run.folder / CONFIG_FILE) == config(tmp_path)
    run.publish_config()
    assert load_config(run.folder / CONFIG_FILE) == config(tmp_path, fast_weights__rank=8)


def test_the_newest_checkpoint_is_the_whole_one_with_the_most_steps(tmp_path: Path) -> None:
    run = started(tmp_path)
    storage = run.checkpoints / run.storage_name
    assert run.newest_checkpoint() == storage / "checkpoint_100"
    shutil.copytree(storage / "checkpoint_100", storage / "checkpoint_150")
    (storage / "checkpoint_150" / COUNTERS).write_text('{"step": 150}')
    assert run.newest_checkpoint() == storage / "checkpoint_100", "Ray has not taken it up"
    (storage / "checkpoint_150").rename(storage / LAST)
    assert run.newest_checkpoint() == storage / LAST
    shutil.rmtree(storage / LAST)
    data = (storage / "checkpoint_100" / TENSORS).read_bytes()
    (storage / "checkpoint_100" / TENSORS).write_bytes(data[:-1])
    assert run.newest_checkpoint() == storage / "checkpoint_50"
    assert run.damaged_checkpoints() == 1
    (storage / "checkpoint_50" / COUNTERS).unlink()
    assert run.newest_checkpoint() is None and run.damaged_checkpoints() == 2


def test_of_a_run_without_ray_the_checkpoint_before_the_last_one_counts_too(tmp_path: Path) -> None:
    run = started(tmp_path)
    storage = run.checkpoints / run.storage_name
    for name, step in ((BEFORE_LAST, 120), (LAST, 140)):
        shutil.copytree(storage / "checkpoint_100", storage / name)
        (storage / name / COUNTERS).write_text(json.dumps({"step": step}))
    assert run.newest_checkpoint() == storage / LAST and run.damaged_checkpoints() == 0
    (storage / LAST / COUNTERS).write_text('{"step": 1')
    assert run.newest_checkpoint() == storage / BEFORE_LAST and run.damaged_checkpoints() == 1
    shutil.rmtree(storage / LAST)
    assert run.newest_checkpoint() == storage / BEFORE_LAST and run.damaged_checkpoints() == 0


def test_a_run_has_one_process_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path / "mine"):
        with (
            pytest.raises(ConfigError, match="another process is working on this run") as error,
            locked(tmp_path / "mine"),
        ):
            pass
        assert "\n" not in str(error.value)
        with locked(tmp_path / "other"):
            pass
    with locked(tmp_path / "mine"):
        pass


def test_runs_of_other_names_are_not_touched(tmp_path: Path) -> None:
    before = started(tmp_path)
    run, resumed = open_run(config(tmp_path, name="other", training__steps=7))
    assert not resumed and run.folder == tmp_path / "other"
    assert before.checkpoints.is_dir() and on_disk(tmp_path)["state"] == "KILLED"


@pytest.mark.parametrize(
    "text",
    [
        "", '{"attempt": 0, "sta', "[]", "null", "{}", '{"attempt": 0, "state": "RUNNING", "colour": 1}',
        '{"attempt": 0, "state": "ASLEEP", "mlflow_run_id": null}', '{"attempt": "x", "state": "KILLED"}',
    ],
)  # fmt: skip
def test_a_damaged_state_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    before = started(tmp_path)
    (before.folder / STATE_FILE).write_text(text)
    with pytest.raises(DataError) as error:
        open_run(config(tmp_path))
    line = str(error.value)
    assert line.startswith(f"{before.folder / STATE_FILE}: is damaged (") and "\n" not in line
    assert f"remove {before.folder}" in line and "name=" in line
    assert (before.folder / STATE_FILE).read_text() == text and before.checkpoints.is_dir()


def test_a_run_without_its_configuration_is_refused_in_one_line(tmp_path: Path) -> None:
    before = started(tmp_path)
    before.config_file.unlink()
    with pytest.raises(DataError, match=r"attempt-000\.toml") as error:
        open_run(config(tmp_path))
    assert "\n" not in str(error.value)


def test_a_change_of_state_is_on_disk_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = started(tmp_path)

    def fails(*args: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as broken:
        broken.setattr(Path, "replace", fails)
        with pytest.raises(OSError, match="disk full"):
            run.update(state="FINISHED")
    assert on_disk(tmp_path)["state"] == "KILLED"
    assert run.update(state="FINISHED").state == on_disk(tmp_path)["state"] == "FINISHED"
    assert run.state == "KILLED", "a run is a value"
