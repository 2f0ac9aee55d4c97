"""Faults that a cluster has, brought about for real: after each, what was learned is what an undisturbed run learns."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

from cortex_core.errors import DataError
from pipelines import train
from pipelines.config import ClusterConfig, RunConfig
from pipelines.runs import Run
from pipelines.tracking import UNSENT_FILE
from tests import tiny
from tests.pipelines.fault_scenes import (
    SMALL,
    Command,
    as_if_undisturbed,
    cut_newest,
    hosts,
    losses,
    named,
    nodes_here,
    on_this_machine,
    tracking_server,
)
from tests.pipelines.train_scenes import (
    LONG,
    TWO,
    events,
    happened,
    has_checkpoint,
    in_mlflow,
    logged_once,
    once,
    recorded,
    sidecars,
    state,
    steps_of,
    train_workers,
)

pytestmark = [
    pytest.mark.slow,
    # mlflow, of pandas, while it logs a table
    pytest.mark.filterwarnings("ignore:For backward compatibility, 'str' dtypes:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, mlflow_database: Callable[[Path], None], ray_here: ClusterConfig
) -> RunConfig:
    """Two workers that nothing happens to. Do not change its folder."""
    out = tmp_path_factory.mktemp("undisturbed")
    mlflow_database(out)
    config = tiny.run_config(out, **TWO)
    assert train.run(config) == 0
    return config


@pytest.fixture(scope="module")
def orphans() -> Iterator[list[psutil.Process]]:
    """To be gone when the tests here have ended: Ray's agents look once a minute whether what they serve is there."""
    left: list[psutil.Process] = []
    yield left
    assert psutil.wait_procs(left, timeout=150)[1] == []


@pytest.fixture
def two(tmp_path: Path, mlflow_database: Callable[[Path], None], ray_here: ClusterConfig) -> RunConfig:
    """The same run, not yet started. Its checkpoints lie where several nodes would see them."""
    mlflow_database(tmp_path)
    return tiny.run_config(tmp_path, **TWO, cluster__storage_path=str(tmp_path / "shared"))


def test_a_worker_that_is_killed_is_replaced(
    two: RunConfig, undisturbed: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    killed: list[int] = []

    def kill() -> None:
        victim = train_workers()[-1]
        killed.append(victim.pid)
        victim.kill()

    with once(lambda: has_checkpoint(two) and bool(train_workers()), kill):
        assert train.run(two) == 0
    said = capsys.readouterr().out
    assert killed and "tiny: starting the workers again" in said
    as_if_undisturbed(two, undisturbed)
    rows = {row["event"]: row for row in events(two)}
    assert rows["cluster ready"]["workers"] == 2 and rows["cluster ready"]["nodes"] == 1
    assert happened(two).count("workers started") == 2
    assert rows["workers started"]["hosts"] == [socket.gethostname()] * 2
    lost, replaced = rows["worker lost"], rows["worker replaced"]
    assert lost["host"] == replaced["host"] == socket.gethostname() and lost["reason"] and lost["rank"] in (0, 1)
    assert happened(two).index("worker lost") < happened(two).index("worker replaced")
    assert rows["checkpoint loaded"]["step"] >= 1 and rows["checkpoint written"]["step"] == LONG
    assert happened(two)[-2:] == ["checkpoint written", "finished"], "what came last, before Ray ended"
    assert "tiny: worker 0 replaced, on " in said or "tiny: worker 1 replaced, on " in said


@pytest.mark.nightly
def test_a_driver_that_is_killed_goes_on_from_its_last_whole_checkpoint(
    tmp_path: Path, mlflow_database: Callable[[Path], None], undisturbed: RunConfig, orphans: list[psutil.Process]
) -> None:
    """As when a machine loses power: the newest checkpoint is half on the disk, so it is the one before."""
    mlflow_database(tmp_path)
    config = tiny.run_config(tmp_path, **TWO)
    first = Command(config)
    try:
        first.wait_until(lambda: has_checkpoint(config) and len(on_this_machine(config)) > 1)
        working = train_workers(first.process.pid)
    finally:
        orphans += first.kill()
    assert len(orphans) > 5 and len(working) == 2 and state(config)["state"] == "KILLED"
    assert psutil.wait_procs(working, timeout=30)[1] == []  # two seconds: until then they go on
    cut_newest(config)
    newest = Run(config.run_dir, 0, "KILLED").newest_checkpoint()
    assert newest is not None and newest in on_this_machine(config) and newest != max(on_this_machine(config))
    second = Command(config)
    try:
        said = second.end()
    finally:
        second.process.kill()
    resumed = re.match(r"Resuming tiny in .*, from step (\d+)\n", said)
    assert resumed is not None and 0 < int(resumed[1]) < LONG
    assert f"the newest checkpoint is damaged: going on from the one before, of step {resumed[1]}\n" in said
    as_if_undisturbed(config, undisturbed)


@pytest.fixture
def cluster_of_three(ray_here: ClusterConfig) -> Iterator[Cluster]:
    with nodes_here(3) as cluster:
        yield cluster


@pytest.fixture
def cluster_of_two(ray_here: ClusterConfig) -> Iterator[Cluster]:
    with nodes_here(2) as cluster:
        yield cluster


@pytest.mark.nightly
def test_a_node_that_is_gone_is_replaced_by_a_spare_one(
    tmp_path: Path, mlflow_database: Callable[[Path], None], cluster_of_three: Cluster, undisturbed: RunConfig
) -> None:
    mlflow_database(tmp_path)
    nodes = cluster_of_three
    there = TWO | {"cluster__address": nodes.address, "cluster__cpus_per_worker": 1.0}
    config = tiny.run_config(tmp_path, **there)
    driver = Command(config)
    try:
        driver.wait_until(lambda: has_checkpoint(config))
        (mailbox,) = hosts(nodes.head_node, "ray::Mailbox")
        working = [node for node in nodes.worker_nodes if hosts(node, "RayTrainWorker")]
        lost = next(node for node in working if not hosts(node, "TrainController"))
        (spare,) = set(nodes.worker_nodes) - set(working)
        nodes.remove_node(lost, allow_graceful=False)
        driver.wait_until(lambda: bool(hosts(spare, "RayTrainWorker")))
        assert mailbox.is_running(), "the progress went with the node"
        said = driver.end()
    finally:
        driver.process.kill()
    assert len(working) == 2
    assert re.search(
        r"^tiny: worker [01] failed: .*\ntiny: starting the workers again\n(.*\n)*tiny: training  step 12/12 ",
        said,
        re.MULTILINE,
    ), said
    as_if_undisturbed(config, undisturbed)


IMPATIENT = """
import sys
from pipelines import cli, cluster
cluster.GROW_EVERY_S = 2.0
sys.exit(cli.main(["train", *sys.argv[1:]]))
"""


@pytest.mark.nightly
def test_a_run_goes_on_with_the_workers_that_fit(
    tmp_path: Path, mlflow_database: Callable[[Path], None], cluster_of_two: Cluster
) -> None:
    """Two, one when a node has gone, two again when another one has come: the curve has no edge."""
    alone, out, steps = tmp_path / "alone", tmp_path / "elastic", 2 * LONG
    for folder in (alone, out):
        folder.mkdir()
        mlflow_database(folder)
    nodes, settings = cluster_of_two, TWO | {"training__steps": steps}
    expected = tiny.run_config(alone, **settings | {"cluster__num_workers": 0, "sharding__stage": 0})
    assert train.run(expected) == 0
    there = {"cluster__address": nodes.address, "cluster__cpus_per_worker": 1.0, "cluster__min_workers": 1}
    config = tiny.run_config(out, **settings | there)
    driver = Command(config, "-c", IMPATIENT, RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="1")  # so long a step takes
    try:
        driver.wait_until(lambda: has_checkpoint(config))
        working = [node for node in nodes.worker_nodes if hosts(node, "RayTrainWorker")]
        lost = next(node for node in working if not hosts(node, "TrainController"))
        nodes.remove_node(lost, allow_graceful=False)
        before = on_this_machine(config)
        driver.wait_until(lambda: "\ntiny: 1 of 2 workers\n" in driver.said.read_text())
        driver.wait_until(lambda: len(on_this_machine(config) - before) > 1)
        another = nodes.add_node(num_cpus=1, **SMALL)
        driver.wait_until(lambda: bool(hosts(another, "RayTrainWorker")))
        said = driver.end()
    finally:
        driver.process.kill()
    assert len(working) == 2
    told = re.findall(r"^tiny: worker [01] (failed)|^tiny: ([12]) of 2 workers$", said, re.MULTILINE)
    assert told == [("failed", ""), ("", "1"), ("", "2")], said
    assert f"training  step {steps}/{steps} " in said
    logged_once(config, steps)
    assert losses(config) == pytest.approx(losses(expected), abs=1e-4)
    assert tiny.furthest(sidecars(config), sidecars(expected)) < 1e-4


@pytest.mark.nightly
def test_with_too_few_nodes_left_it_ends_in_one_line_and_goes_on_with_fewer(
    tmp_path: Path, mlflow_database: Callable[[Path], None], cluster_of_two: Cluster, undisturbed: RunConfig
) -> None:
    mlflow_database(tmp_path)
    there = {
        "cluster__address": cluster_of_two.address, "cluster__cpus_per_worker": 1.0,
        "cluster__min_workers": 2, "cluster__worker_start_timeout_s": 15.0,
    }  # fmt: skip
    config = tiny.run_config(tmp_path, **TWO | there)
    first = Command(config)
    try:
        first.wait_until(lambda: has_checkpoint(config))
        lost = next(node for node in cluster_of_two.worker_nodes if hosts(node, "RayTrainWorker"))
        cluster_of_two.remove_node(lost, allow_graceful=False)
        assert first.process.wait(timeout=240) == 2, first.said.read_text()
    finally:
        first.process.kill()
    said = first.said.read_text().splitlines()
    assert said[-1].startswith("cortex: cluster.min_workers = 2: the Ray cluster had room for 1 for 15 s"), said
    assert not [line for line in said if "Traceback" in line]
    second = Command(tiny.run_config(tmp_path, **TWO | there | {"cluster__min_workers": 1}))
    try:
        said = second.end()
    finally:
        second.process.kill()
    assert re.match(r"Resuming tiny in .*, from step \d+\n", said) and "\ntiny: 1 of 2 workers\n" in said
    logged_once(config, LONG)
    assert losses(config) == pytest.approx(losses(undisturbed), abs=1e-4)
    assert tiny.furthest(sidecars(config), sidecars(undisturbed)) < 1e-4


@pytest.mark.nightly
def test_a_worker_that_hangs_is_named_and_replaced(
    two: RunConfig, undisturbed: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    impatient = two.cluster.model_copy(update={"hang_timeout_s": 8.0})
    stopped: list[psutil.Process] = []

    def stop() -> None:
        stopped.extend(train_workers()[-1:])
        stopped[0].suspend()

    with once(lambda: has_checkpoint(two) and bool(train_workers()), stop):
        assert train.run(two.model_copy(update={"cluster": impatient})) == 0
    said = capsys.readouterr().out
    place = rf"does not answer on \S+ \(\S+, process {stopped[0].pid}\): no step for 8 s \(cluster\.hang_timeout_s\)"
    assert re.search(rf"^tiny: worker [01] failed: {place}\ntiny: starting the workers again$", said, re.MULTILINE), (
        said
    )
    assert said.count(" failed: ") == 1
    (found,) = (row for row in events(two) if row["event"] == "hang found")
    assert found["host"] == socket.gethostname() and re.fullmatch(place, found["reason"])
    assert {"worker lost", "worker replaced"} <= {
        row["event"] for row in events(two) if row.get("rank") == found["rank"]
    }
    assert psutil.wait_procs(stopped, timeout=30)[1] == []
    as_if_undisturbed(two, undisturbed)


def test_what_only_watches_may_fail(
    two: RunConfig, undisturbed: RunConfig, locked: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The progress mailbox dies, and MLflow cannot be written for a while: what it misses is sent later."""
    killed: list[psutil.Process] = []
    kept: list[bool] = []

    def fail() -> None:
        killed.extend(named("ray::Mailbox", psutil.Process()))
        for process in killed:
            process.kill()
        with locked(two.tracking_uri):
            deadline = time.monotonic() + 60
            while not (two.run_dir / UNSENT_FILE).exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            kept.append((two.run_dir / UNSENT_FILE).exists())

    with once(lambda: has_checkpoint(two), fail):
        assert train.run(two) == 0
    assert killed and kept == [True]
    assert [row["event"] for row in events(two)][-1] == "finished", "the driver has not gone with the mailbox"
    assert "did not reach MLflow" not in capsys.readouterr().out and not (two.run_dir / UNSENT_FILE).exists()
    as_if_undisturbed(two, undisturbed)


@pytest.mark.nightly
def test_an_mlflow_server_that_goes_away_for_good_is_told_at_the_end(
    tmp_path: Path, mlflow_database: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Also told is where the metrics are that it did not take. The run, without Ray, is whole."""
    mlflow_database(tmp_path)
    config = tiny.run_config(tmp_path)
    with tracking_server(config.tracking_uri) as (uri, kill), tiny.at_update(4, kill):
        away = tiny.run_config(tmp_path, tracking__uri=uri)
        assert train.run(away) == 0
    said = capsys.readouterr().out
    unsent = away.run_dir / UNSENT_FILE
    assert re.search(rf"^\d+ metric values did not reach MLflow at {uri}: kept in {unsent}$", said, re.MULTILINE), said
    kept = [json.loads(row) for row in unsent.read_text().splitlines()]
    assert [row["step"] for row in kept if row["metric"] == "loss"] == [4, 5, 6]
    (told,) = (row for row in events(away) if row["event"] == "metrics unsent")
    assert told["file"] == str(unsent)
    assert [row["event"] for row in events(away)][-2:] == ["MLflow incomplete", "finished"]
    assert (away.run_dir / "report.html").is_file() and state(away)["state"] == "FINISHED"
    (run,) = in_mlflow(config)  # what the server has written
    assert steps_of(config, run) == [1, 2, 3] and run.info.status == "RUNNING"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of three megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.nightly
def test_a_full_disk_ends_the_run_in_one_line_and_loses_nothing(
    two: RunConfig, small_disk: Path, undisturbed: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor does a checkpoint of which half is lost afterwards, on storage that is not the driver's."""
    cluster = two.cluster.model_copy(update={"storage_path": str(small_disk)})
    two, other = two.model_copy(update={"cluster": cluster}), small_disk / "other"

    def fill() -> None:
        with other.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    full = lambda: has_checkpoint(two) and len(recorded(two)) > 1  # noqa: E731
    with once(full, fill), pytest.raises(DataError) as error:
        train.run(two)
    line = str(error.value)
    assert re.match(
        rf"{small_disk}: no space left for a checkpoint \(it takes 1\.\d MB .*, 0\.0 MB is free\)\. Make room", line
    ), line
    assert "\n" not in line and "starting the workers again" not in capsys.readouterr().out
    (run,) = in_mlflow(two)
    assert run.info.status == "FAILED" and steps_of(two, run) == list(range(1, len(steps_of(two, run)) + 1))
    other.unlink()
    cut_newest(two)
    assert train.run(two) == 0
    assert "the newest checkpoint is damaged: going on from the one before, of step " in capsys.readouterr().out
    as_if_undisturbed(two, undisturbed)


@pytest.mark.nightly
def test_any_number_of_workers_goes_on_where_another_has_stopped(two: RunConfig, undisturbed: RunConfig) -> None:
    """Two, one that has no shards, four: the curve has no edge, because data and weights are the same in all of them."""
    last = 0
    for workers in (2, 1, 4):
        cluster = two.cluster.model_copy(update={"num_workers": workers, "cpus_per_worker": 0.25})
        sharding = two.sharding.model_copy(update={"stage": 0 if workers == 1 else 3})
        part = two.model_copy(update={"cluster": cluster, "sharding": sharding})
        if workers == 4:
            assert train.run(part) == 0
            break
        before = recorded(part) if last else set()
        with once(
            lambda before=before, part=part: has_checkpoint(part) and bool(recorded(part) - before),
            lambda: os.kill(os.getpid(), signal.SIGINT),
        ), pytest.raises(KeyboardInterrupt):  # fmt: skip
            train.run(part)
        (run,) = in_mlflow(two)
        steps = steps_of(two, run)
        assert last < len(steps) < LONG and steps == list(range(1, len(steps) + 1))
        last = len(steps)
    logged_once(two, LONG)
    expected = losses(undisturbed)
    assert losses(two) == pytest.approx(expected, abs=1e-4)
    assert tiny.furthest(sidecars(two), sidecars(undisturbed)) < 1e-4
