"""Ray is started, joined and left as promised. This file is also the program that the tests start: `SCENE [ADDRESS]`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray

from cortex_core.errors import ConfigError
from pipelines import cluster
from pipelines.actors import ask
from pipelines.config import ClusterConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has no Ray yet, and may not start one."""

    def refuse(**settings: object) -> None:
        raise AssertionError("something was started")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)


@pytest.mark.usefixtures("_no_ray")
@pytest.mark.parametrize(
    ("settings", "cpus", "gpus", "message"),
    [
        ({"num_workers": 4}, 2, 0,
         "cluster.num_workers = 4: with cluster.cpus_per_worker = 1, this machine has room for 2 (2 CPUs). "
         "Set cluster.num_workers=2 or less, or cluster.cpus_per_worker lower"),
        ({"num_workers": 8, "min_workers": 4}, 2, 0,
         "cluster.min_workers = 4: with cluster.cpus_per_worker = 1, this machine has room for 2 (2 CPUs). "
         "Set cluster.min_workers=2 or less, or"),
        ({"num_workers": 8, "min_workers": 2, "use_gpu": True}, 8, 1,
         "cluster.min_workers = 2 needs 2 GPUs, one each, but this machine has 1. Set cluster.min_workers=1, or"),
        ({"num_workers": 1, "cpus_per_worker": 8.0}, 2, 0,
         "cluster.num_workers = 1: with cluster.cpus_per_worker = 8, this machine has room for 0 (2 CPUs). "
         "Set cluster.cpus_per_worker lower"),
        ({"num_workers": 2, "use_gpu": True}, 8, 1,
         "cluster.use_gpu = true: cluster.num_workers = 2 needs 2 GPUs, one each, but this machine has 1. "
         "Set cluster.num_workers=1, or cluster.use_gpu=false"),
        ({"num_workers": 2, "use_gpu": True}, 8, 0, "this machine has 0. Set cluster.use_gpu=false"),
    ],
)  # fmt: skip
def test_workers_that_cannot_fit_are_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], cpus: int, gpus: int, message: str
) -> None:
    monkeypatch.setattr(cluster, "_cpus_here", lambda: cpus)
    monkeypatch.setattr(cluster, "_gpus_here", lambda: gpus)
    with pytest.raises(ConfigError) as error, cluster.connect(ClusterConfig(**settings)):
        pass
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.usefixtures("_no_ray")
def test_shares_of_a_cpu_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_cpus_here", lambda: 1)
    cluster._check_this_machine(ClusterConfig(num_workers=10, cpus_per_worker=0.1))


def test_the_fewest_workers_of_a_range_have_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.ray_state, "get_max_resources_from_cluster_config", lambda: None)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    cluster._check_cluster(ClusterConfig(num_workers=8, min_workers=2))
    with pytest.raises(ConfigError, match=r"cluster\.min_workers = 3: .* this Ray cluster has room for 2 \(2 CPUs\)"):
        cluster._check_cluster(ClusterConfig(num_workers=8, min_workers=3))


def test_a_cluster_that_grows_is_not_judged_by_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.ray_state, "get_max_resources_from_cluster_config", lambda: None)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"node:__internal_head__": 1.0}}])
    for settings in ({}, {"use_gpu": True}):
        with pytest.raises(ConfigError, match=r"this Ray cluster has .*on demand: cluster\.autoscaling=true$"):
            cluster._check_cluster(ClusterConfig(**settings))
        cluster._check_cluster(ClusterConfig(autoscaling=True, **settings))


@pytest.mark.usefixtures("_no_ray")
def test_no_workers_means_no_ray() -> None:
    with cluster.connect(ClusterConfig(num_workers=0)):
        pass


@pytest.mark.usefixtures("_no_ray")
@pytest.mark.parametrize("through", ["setting", "environment"])
def test_an_address_where_nobody_answers_is_one_line_at_once(monkeypatch: pytest.MonkeyPatch, through: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    if through == "environment":
        monkeypatch.setenv("RAY_ADDRESS", address)
    config = ClusterConfig(address=address if through == "setting" else None)
    started = time.monotonic()
    with (
        pytest.raises(ConfigError, match=f"cluster.address = {address}: no Ray cluster"),
        cluster.connect(config),
    ):
        pass
    assert time.monotonic() - started < 6


def test_what_the_shell_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    for name in ("MKL_NUM_THREADS", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"):  # which a Ray of earlier tests has set
        monkeypatch.delenv(name, raising=False)
    variables = cluster.environment(ClusterConfig(worker_threads=3, worker_start_timeout_s=5), None)
    assert "OMP_NUM_THREADS" not in variables and variables["MKL_NUM_THREADS"] == "3"
    assert variables["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] == "5.0"


def test_accelerators_and_preemption_follow_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR")
    assert cluster.environment(ClusterConfig(), None)["DS_ACCELERATOR"] == "cpu"
    assert "DS_ACCELERATOR" not in cluster.environment(ClusterConfig(use_gpu=True), None)
    assert "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER" not in cluster.environment(ClusterConfig(), "auto")


def test_what_ray_train_is_told() -> None:
    config = ClusterConfig(num_workers=3, cpus_per_worker=2.0, use_gpu=True, max_failures=5)
    scaling = cluster.scaling(config)
    assert scaling.num_workers == 3 and scaling.resources_per_worker == {"CPU": 2.0, "GPU": 1.0}
    assert not scaling.elasticity_enabled
    assert cluster.scaling(ClusterConfig(num_workers=3, min_workers=2)).num_workers == (2, 3)
    assert cluster.failure(config).max_failures == cluster.failure(config).controller_failure_limit == 5


def test_a_thread_cannot_bring_ray_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Method:
        def remote(self) -> None:
            raise AssertionError("Ray would be started anew here")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(RuntimeError, match="not running"):
        ask(Method(), timeout_s=1.0)  # type: ignore[arg-type]


def test_without_workers_a_kill_is_an_interruption_too() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), cluster.connect(ClusterConfig(num_workers=0)):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


# --- with Ray ---------------------------------------------------------------------------------------------------------


def _program(*arguments: str, **variables: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, *arguments]
    env = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("kill", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.nightly)])
def test_an_interrupted_driver_leaves_nothing_behind(kill: signal.Signals) -> None:
    driver = _program("wait")
    try:
        assert driver.stdout is not None and driver.stdout.readline() == "connected\n", "Ray was not silent"
        children = psutil.Process(driver.pid).children(recursive=True)
        memory = sum(p.memory_full_info().uss for p in [psutil.Process(driver.pid), *children])
        assert len(children) > 3 and memory < 2e9
        os.killpg(driver.pid, kill)  # as a terminal does: every process of the group gets it
        said, _ = driver.communicate(timeout=60)
    finally:
        driver.kill()
    assert (driver.returncode, said) == (130, "interrupted\n")
    assert psutil.wait_procs(children, timeout=10)[1] == []


@pytest.mark.slow
def test_a_running_cluster_is_joined_and_left_running(ray_here: ClusterConfig) -> None:
    address = ray.get_runtime_context().gcs_address
    joiner = _program("join", RAY_ADDRESS=address)
    said, _ = joiner.communicate(timeout=120)
    assert said.splitlines() == ["5", "ConfigError", "left"], said
    assert ray.get(ray.remote(num_cpus=0)(lambda: 1).remote(), timeout=30) == 1


@pytest.mark.slow
def test_within_ray_connect_only_checks(ray_here: ClusterConfig) -> None:
    with cluster.connect(ray_here):
        pass
    assert ray.is_initialized()
    with pytest.raises(ConfigError, match=r"this Ray cluster has room for .* on demand: cluster\.autoscaling=true"), \
         cluster.connect(ClusterConfig(num_workers=4096)):  # fmt: skip
        pass
    with cluster.connect(ClusterConfig(num_workers=4096, autoscaling=True)):
        pass


def _wait() -> None:
    try:
        with cluster.connect(ClusterConfig(num_workers=2, cpus_per_worker=0.5)):
            print("connected", flush=True)
            time.sleep(120)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        sys.exit(130)


def _join() -> None:
    def threads() -> str:
        return os.environ["MKL_NUM_THREADS"]

    os.environ.pop("MKL_NUM_THREADS", None)
    with cluster.connect(ClusterConfig(num_workers=1, cpus_per_worker=0.5, worker_threads=5)):
        print(ray.get(ray.remote(num_cpus=0)(threads).remote()))
    try:
        with cluster.connect(ClusterConfig(num_workers=4096)):
            pass
    except ConfigError:
        print("ConfigError")
    print("left" if not ray.is_initialized() else "still connected")


if __name__ == "__main__":
    {"wait": _wait, "join": _join}[sys.argv[1]]()
