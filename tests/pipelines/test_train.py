"""`cortex train` from end to end: what it leaves behind, and that it goes on after any interruption."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from mlflow import MlflowClient
from torch import Tensor

from cortex_core.backbone.model import Cortex
from cortex_core.backbone.sidecar_files import WEIGHTS
from cortex_core.errors import ConfigError, DataError
from cortex_core.training.checkpoint import TENSORS
from pipelines import cli, train
from pipelines.config import CONFIG_FILE, SIDECARS_FOLDER, ClusterConfig, RunConfig, load_config
from pipelines.events import EVENTS_FILE
from pipelines.runs import LAST, LOCK_FILE, STATE_FILE
from pipelines.toml_text import dump_toml
from tests import tiny
from tests.pipelines.train_scenes import (
    LONG,
    ROOT,
    STEPS,
    TWO,
    checkpoints,
    events,
    happened,
    has_checkpoint,
    in_mlflow,
    learned_alone,
    logged_once,
    once,
    recorded,
    sidecars,
    state,
    steps_of,
    train_workers,
)

# mlflow, of pandas, while it logs a table.
pytestmark = pytest.mark.filterwarnings("ignore:For backward compatibility, 'str' dtypes:DeprecationWarning")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, mlflow_database: Callable[[Path], None]) -> RunConfig:
    """A run that nothing interrupted, in this process. Do not change its folder."""
    out = tmp_path_factory.mktemp("finished")
    mlflow_database(out)
    config = tiny.run_config(out)
    assert train.run(config) == 0
    return config


@pytest.fixture
def fresh(tmp_path: Path, mlflow_database: Callable[[Path], None]) -> RunConfig:
    """The same run, not yet started."""
    mlflow_database(tmp_path)
    return tiny.run_config(tmp_path)


def test_a_finished_run_leaves_its_results_in_its_folder(finished: RunConfig) -> None:
    folder = finished.run_dir
    names = {path.name for path in folder.iterdir()}
    assert names == {
        CONFIG_FILE, STATE_FILE, LOCK_FILE, SIDECARS_FOLDER, "checkpoints", "report.html", "reach.png", "usage.png", "training.png",
        "evaluation.json", "evaluation.parquet", "evaluation.csv", EVENTS_FILE,
    }  # fmt: skip
    assert state(finished)["state"] == "FINISHED"
    assert load_config(folder / CONFIG_FILE) == finished
    page = (folder / "report.html").read_text()
    assert "tiny" in page and "<script src" not in page
    for picture in ("reach", "usage", "training"):
        assert (folder / f"{picture}.png").read_bytes().startswith(b"\x89PNG")


def test_what_happened_to_a_run_is_a_line_each(finished: RunConfig) -> None:
    written = [f"checkpoint written {step}" for step in (2, 4, 6)]
    assert [f"{row['event']} {row.get('step', '')}".strip() for row in events(finished)] == [
        "started", "cluster ready", *written, "evaluation begun", "checkpoint written 6", "finished",
    ]  # fmt: skip
    rows = events(finished)
    assert {row["run"] for row in rows} == {"tiny"}
    assert {row["mlflow_run_id"] for row in rows} == {state(finished)["mlflow_run_id"]}
    times = [datetime.fromisoformat(row["time"]) for row in rows]
    assert times == sorted(times) and {time.utcoffset() for time in times} == {timedelta(0)}
    sizes = [row["bytes"] for row in rows if row["event"] == "checkpoint written"]
    kept = finished.run_dir / "checkpoints" / "attempt-000" / LAST
    assert sizes[-1] == sum(path.stat().st_size for path in kept.rglob("*") if path.is_file())


def test_the_evaluation_is_the_same_in_every_format(finished: RunConfig) -> None:
    document = json.loads((finished.run_dir / "evaluation.json").read_text())
    assert document["schema"] == 1 and document["run"] == "tiny"
    assert document["config"]["training"]["steps"] == STEPS and document["versions"]["torch"] == torch.__version__
    rows = pd.DataFrame(document["rows"])
    assert set(rows["gap_tokens"]) == {0, 70} and set(rows["memory"]) == {"on", "off"} and set(rows["n"]) == {6}
    for other in (
        pd.read_csv(finished.run_dir / "evaluation.csv"), pd.read_parquet(finished.run_dir / "evaluation.parquet"),
    ):  # fmt: skip
        pd.testing.assert_frame_equal(other[list(rows.columns)], rows, check_dtype=False)
    assert np.isfinite(document["drift"]["ratio"]) and document["usage"][0]["layer"] == 1


def test_the_memory_loads_with_its_backbone(finished: RunConfig) -> None:
    model = Cortex.from_pretrained(finished.backbone.name, sidecars=finished.run_dir / SIDECARS_FOLDER)
    assert model.fast_weights == finished.fast_weights and model.segment_tokens == tiny.SEGMENT
    assert tiny.same(dict(model.sidecars.state_dict()), sidecars(finished))
    assert not tiny.same(tiny.weights(model.sidecars), tiny.weights(tiny.model().sidecars)), "these are untrained"


def test_mlflow_has_the_whole_run(finished: RunConfig) -> None:
    logged_once(finished)
    (run,) = in_mlflow(finished)
    client = MlflowClient(tracking_uri=finished.tracking_uri)
    assert run.data.params["fast_weights.rank"] == str(tiny.RANK)
    document = json.loads((finished.run_dir / "evaluation.json").read_text())
    for row in document["rows"]:
        name = f"recall/key_value/text/gap_{row['gap_tokens']:07d}/memory_{row['memory']}"
        assert run.data.metrics[name] == row["accuracy"]
    assert run.data.metrics["drift/ratio"] == document["drift"]["ratio"]
    assert "phase" not in run.data.metrics and "step" not in run.data.metrics
    files = {each.path for each in client.list_artifacts(run.info.run_id)}
    assert {"report.html", "reach.png", "evaluation.json", "evaluation_rows.json", SIDECARS_FOLDER} <= files
    inside = {each.path for each in client.list_artifacts(run.info.run_id, SIDECARS_FOLDER)}
    assert inside == {f"{SIDECARS_FOLDER}/{WEIGHTS}", f"{SIDECARS_FOLDER}/cortex.json"}


def test_what_is_said_on_the_way(fresh: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.run(fresh) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"Starting tiny in {fresh.run_dir}"
    mine = [line.removeprefix("tiny: ") for line in said if line.startswith("tiny: ")]  # told apart from other runs'
    phases = [line for line in mine if line in {"loading the backbone", "training", "evaluating", "writing the report"}]
    assert phases == ["loading the backbone", "training", "evaluating", "writing the report"]
    assert any(line.startswith(f"training  step {STEPS}/{STEPS}  loss ") for line in mine)
    assert any(re.fullmatch(rf"checkpoint of step {STEPS} written, \d\.\d MB", line) for line in mine)
    assert mine[-1] == "finished" and "\r" not in "".join(said)
    assert f"Report    {fresh.run_dir / 'report.html'}" in said
    assert any("key_value, gap 70" in line for line in said)


@pytest.mark.parametrize(("step", "since"), [(1, ""), (4, ", from step 2")])
def test_an_interrupted_run_is_resumed_and_is_the_same_run(
    finished: RunConfig, fresh: RunConfig, capsys: pytest.CaptureFixture[str], step: int, since: str
) -> None:
    with tiny.interrupted_in(step):
        train.run(fresh)
    (run,) = in_mlflow(fresh)
    assert happened(fresh)[-1] == "interrupted"
    assert state(fresh) == {"attempt": 0, "state": "KILLED", "mlflow_run_id": run.info.run_id}
    assert run.info.status == "KILLED" and steps_of(fresh, run) == list(range(1, step))
    assert not (fresh.run_dir / SIDECARS_FOLDER).exists() and not (fresh.run_dir / "report.html").exists()
    capsys.readouterr()
    assert train.run(fresh) == 0
    assert capsys.readouterr().out.startswith(f"Resuming tiny in {fresh.run_dir}{since}\n")
    (resumed,) = (row for row in events(fresh) if row["event"] == "resumed")
    assert resumed["from_step"] == (int(since.rpartition(" ")[2]) if since else None)
    assert {row["mlflow_run_id"] for row in events(fresh)} == {run.info.run_id}
    assert happened(fresh)[0] == "started" and happened(fresh)[-1] == "finished"
    assert tiny.same(sidecars(fresh), sidecars(finished))
    logged_once(fresh)
    assert state(fresh)["state"] == "FINISHED" and state(fresh)["attempt"] == 0


def test_a_run_can_be_interrupted_more_than_once(finished: RunConfig, fresh: RunConfig) -> None:
    for step in (3, 2, 1):  # counted from where each part begins: in step 3, in step 4, in step 5
        with tiny.interrupted_in(step):
            train.run(fresh)
    assert train.run(fresh) == 0
    assert tiny.same(sidecars(fresh), sidecars(finished))
    logged_once(fresh)


def test_a_checkpoint_of_which_half_is_lost_is_passed_over(
    finished: RunConfig, fresh: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    with tiny.interrupted_in(5):
        train.run(fresh)
    with (fresh.run_dir / "checkpoints" / "attempt-000" / LAST / TENSORS).open("r+b") as file:
        file.truncate(os.fstat(file.fileno()).st_size // 2)
    capsys.readouterr()
    assert train.run(fresh) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith(", from step 2")
    assert "tiny: the newest checkpoint is damaged: going on from the one before, of step 2" in said
    passed = [row for row in events(fresh) if row["event"] in ("damaged checkpoint passed over", "checkpoint loaded")]
    assert [row.get("checkpoints", row.get("step")) for row in passed] == [1, 2]
    assert tiny.same(sidecars(fresh), sidecars(finished))
    logged_once(fresh)


def test_without_mlflow_nothing_begins_and_then_it_can(
    tmp_path: Path, mlflow_database: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{probe.getsockname()[1]}"
    config = tiny.run_config(tmp_path)
    (tmp_path / "mine.toml").write_text(dump_toml(config))
    began = time.monotonic()
    assert cli.main(["train", str(tmp_path / "mine.toml"), f"tracking.uri={uri}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line.startswith(f"cortex: tracking.uri = {uri}: MLflow cannot be used there (")
        and time.monotonic() - began < 30
    )
    left = {str(path.relative_to(config.run_dir)) for path in config.run_dir.rglob("*") if path.is_file()}
    assert left == {LOCK_FILE, STATE_FILE, CONFIG_FILE, "checkpoints/attempt-000.toml"}
    mlflow_database(tmp_path)
    assert train.run(config) == 0
    logged_once(config)


def test_an_interrupted_run_is_not_resumed_with_other_settings(fresh: RunConfig) -> None:
    with tiny.interrupted_in(3):
        train.run(fresh)
    with pytest.raises(ConfigError, match=r"training\.steps differs from the unfinished run"):
        train.run(fresh.model_copy(update={"training": fresh.training.model_copy(update={"steps": 9})}))
    assert len(in_mlflow(fresh)) == 1 and state(fresh)["state"] == "KILLED"


def test_a_finished_run_is_done_again_under_the_same_name(finished: RunConfig, fresh: RunConfig) -> None:
    assert train.run(fresh) == 0
    again = fresh.model_copy(update={"seed": 1})
    assert train.run(again) == 0
    assert state(again) | {"mlflow_run_id": ""} == {"attempt": 1, "state": "FINISHED", "mlflow_run_id": ""}
    assert [run.info.status for run in in_mlflow(again)] == ["FINISHED", "FINISHED"]
    assert not tiny.same(sidecars(again), sidecars(finished))
    assert load_config(again.run_dir / CONFIG_FILE).seed == 1


def diverging(config: RunConfig) -> RunConfig:
    """Rates that no weight survives: every loss after the first step is not a number."""
    huge = dict.fromkeys(("learning_rate", "gate_learning_rate", "output_learning_rate"), 1e37)
    rates = config.optimizer.model_copy(update={**huge, "warmup_steps": 0})
    limit = config.training.model_copy(update={"max_nonfinite_steps": 0, "sparsity_span": (0.0, 0.0)})
    return config.model_copy(update={"optimizer": rates, "training": limit})


def test_a_run_that_fails_says_so_and_stays_resumable(fresh: RunConfig) -> None:
    with pytest.raises(FloatingPointError, match=r"lower optimizer\.learning_rate"):
        train.run(diverging(fresh))
    (run,) = in_mlflow(fresh)
    assert run.info.status == "FAILED" and state(fresh)["state"] != "FINISHED"
    assert events(fresh)[-1]["event"] == "failed" and "lower optimizer.learning_rate" in events(fresh)[-1]["reason"]
    assert not (fresh.run_dir / SIDECARS_FOLDER).exists()


# --- with Ray ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, mlflow_database: Callable[[Path], None]) -> dict[str, Tensor]:
    """What one process without Ray and without shards learns from the configuration of two workers."""
    out = tmp_path_factory.mktemp("reference")
    mlflow_database(out)
    return learned_alone(out, TWO)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage that several runs are given; none may take another's checkpoints for its own."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
def two(tmp_path: Path, mlflow_database: Callable[[Path], None], ray_here: ClusterConfig, shared: Path) -> RunConfig:
    """Two workers that share the backbone, on the cluster of the session."""
    mlflow_database(tmp_path)
    return tiny.run_config(tmp_path, **TWO, cluster__storage_path=str(shared))


@pytest.mark.slow
@pytest.mark.nightly
def test_what_would_diverge_again_is_not_tried_again(two: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FloatingPointError, match=r"lower optimizer\.learning_rate"):
        train.run(diverging(two))
    said = capsys.readouterr().out
    assert said.count("loading the backbone") == 1 and "starting the workers again" not in said


@pytest.mark.slow
def test_two_workers_learn_what_one_process_learns(two: RunConfig, reference: dict[str, Tensor]) -> None:
    assert train.run(two) == 0
    assert tiny.furthest(sidecars(two), reference) < 1e-4
    logged_once(two, LONG)
    document = json.loads((two.run_dir / "evaluation.json").read_text())
    assert document["backbone_parameters"] == sum(p.numel() for p in tiny.model().backbone.parameters())
    assert {row["n"] for row in document["rows"]} == {6}
    model = Cortex.from_pretrained(two.backbone.name, sidecars=two.run_dir / SIDECARS_FOLDER)
    assert tiny.same(dict(model.sidecars.state_dict()), sidecars(two))


@pytest.mark.slow
@pytest.mark.nightly
def test_a_worker_is_replaced_after_the_checkpoint_that_the_run_resumed_from_is_gone(
    tmp_path: Path,
    mlflow_database: Callable[[Path], None],
    ray_here: ClusterConfig,
    shared: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ray keeps the last two checkpoints alone: what the second part began with is no longer there.

    The run is long enough that both parts see several checkpoints come and go, however late a signal arrives.
    """
    settings = TWO | {"training__steps": 2 * LONG}
    mlflow_database(tmp_path)
    two = tiny.run_config(tmp_path, **settings, cluster__storage_path=str(shared))
    ctrl_c = lambda: os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
    with once(lambda: has_checkpoint(two), ctrl_c), pytest.raises(KeyboardInterrupt):
        train.run(two)
    first = recorded(two)
    assert first
    killed: list[int] = []

    def kill() -> None:
        victim = train_workers()[-1]
        killed.append(victim.pid)
        victim.kill()

    with once(lambda: not first & set(checkpoints(two)) and bool(train_workers()), kill):
        assert train.run(two) == 0
    assert killed and "starting the workers again" in capsys.readouterr().out
    alone = tmp_path / "alone"
    alone.mkdir()
    mlflow_database(alone)
    assert tiny.furthest(sidecars(two), learned_alone(alone, settings)) < 1e-4
    logged_once(two, 2 * LONG)


@pytest.mark.slow
@pytest.mark.nightly
def test_a_run_begun_without_ray_goes_on_with_it(two: RunConfig, reference: dict[str, Tensor]) -> None:
    alone = tiny.run_config(
        two.run_dir.parent,
        **TWO | {"cluster__num_workers": 0, "sharding__stage": 0, "cluster__storage_path": two.cluster.storage_path},
    )
    with tiny.interrupted_in(6):
        train.run(alone)
    (run,) = in_mlflow(alone)
    before = steps_of(alone, run)
    assert 0 < len(before) < LONG
    assert train.run(two) == 0
    assert tiny.furthest(sidecars(two), reference) < 1e-4
    logged_once(two, LONG)


@pytest.mark.slow
def test_what_a_user_gave_wrong_ends_the_run_at_once(two: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """As the error that it is, found by the workers, who are not started again for it; then it may be corrected."""
    text = two.run_dir.parent / "empty"
    text.mkdir()
    (text / "a.txt").touch()
    empty = two.data.model_copy(update={"path": str(text)})
    with pytest.raises(DataError) as error:
        train.run(two.model_copy(update={"data": empty}))
    assert "\n" not in str(error.value)
    assert "starting the workers again" not in capsys.readouterr().out
    (run,) = in_mlflow(two)
    assert run.info.status == "FAILED"


@pytest.mark.slow
def test_ctrl_c_on_the_command_line(
    tmp_path: Path,
    mlflow_database: Callable[[Path], None],
    ray_here: ClusterConfig,
    reference: dict[str, Tensor],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A Ray cluster of the command's own, and nothing of it is left; the second start is in this process, without Ray."""
    mlflow_database(tmp_path)
    config = tiny.run_config(tmp_path, **TWO | {"cluster__num_workers": 1, "sharding__stage": 0})
    (tmp_path / "mine.toml").write_text(dump_toml(config))
    driver = subprocess.Popen(
        [sys.executable, "-m", "pipelines.train", str(tmp_path / "mine.toml")], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 240
        while not has_checkpoint(config):
            assert driver.poll() is None and time.monotonic() < deadline, driver.communicate()[0]
            time.sleep(0.05)
        children = psutil.Process(driver.pid).children(recursive=True)
        os.killpg(driver.pid, signal.SIGINT)  # as a terminal does: every process of the group gets it
        said, _ = driver.communicate(timeout=120)
    finally:
        driver.kill()
    assert driver.returncode == 130, said
    assert "Traceback" not in said and said.splitlines()[-1].startswith("cortex: interrupted; to resume: cortex train ")
    assert len(children) > 3 and psutil.wait_procs(children, timeout=30)[1] == []
    (run,) = in_mlflow(config)
    assert run.info.status == "KILLED" and state(config)["state"] == "KILLED"
    capsys.readouterr()
    assert train.run(tiny.run_config(tmp_path, **TWO | {"cluster__num_workers": 0, "sharding__stage": 0})) == 0
    first = re.match(r"Resuming tiny in .*, from step (\d+)\n", capsys.readouterr().out)
    assert first is not None and 0 < int(first[1]) < LONG
    assert tiny.furthest(sidecars(config), reference) < 1e-4
    logged_once(config, LONG)
