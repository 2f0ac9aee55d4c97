"""Ray for the length of one run: started on this machine, or joined where it runs already."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import ray
from ray._private import worker as ray_worker
from ray._private.state import state as ray_state
from ray.train import FailureConfig, ScalingConfig

from cortex_core.errors import ConfigError
from pipelines.actors import disconnect
from pipelines.config import ClusterConfig

OBJECT_STORE_BYTES = 256 * 2**20
"""For a Ray started here: only the training function, configurations and metrics pass through it."""
ANSWER_TIMEOUT_S = 5.0
GROW_EVERY_S = 60.0
"""Between two looks at whether a run with fewer workers than it may have has room for more."""


@contextmanager
def connect(cluster: ClusterConfig) -> Iterator[None]:
    """Ray while the block runs. What was started here is gone afterwards, what was joined stays.

    Joins `cluster.address`, or the cluster that RAY_ADDRESS names (a submitted job has it); without either,
    Ray is started on this machine. A process that is connected already stays as it is; without workers
    there is no Ray. Within the block SIGTERM does what Ctrl-C does, so that `kill` cleans up, too.

    Raises ConfigError: the workers cannot fit, or no cluster answers. Before anything is started.
    """
    if ray.is_initialized() and cluster.num_workers:
        _check_cluster(cluster)
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    if cluster.num_workers == 0:
        _on_sigterm(_interrupt)
        try:
            yield
        finally:
            _on_sigterm(before)
        return
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    variables = environment(cluster, address)
    if address is None:
        _check_this_machine(cluster)
    else:
        _check_answers(address)
    with exported(variables):
        try:
            _start(cluster) if address is None else _join(address, variables)
            _on_sigterm(_interrupt)  # Ray has set one that exits on the spot
            _check_cluster(cluster)
            yield
        finally:
            disconnect()
            _on_sigterm(before)


def environment(cluster: ClusterConfig, address: str | None) -> dict[str, str]:
    """Variables for driver, controller and workers, on the cluster at `address` (None: a Ray started here). What the
    shell or the submitted job has set stays."""
    threads = str(cluster.worker_threads)
    wanted = {
        # A worker's report is taken up when the controller looks next, by default every 2 s.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(cluster.worker_start_timeout_s),
        "RAY_TRAIN_METRICS_ENABLED": "0",  # for Prometheus; metrics go to MLflow
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    if not cluster.use_gpu:
        wanted["DS_ACCELERATOR"] = "cpu"
    if address is None:
        wanted["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # nobody announces that this machine goes away
    return {name: value for name, value in wanted.items() if name not in os.environ}


@contextmanager
def exported(variables: Mapping[str, str]) -> Iterator[None]:
    """In the environment while the block runs, for what is started meanwhile; afterwards it is as before."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def started_here() -> bool:
    """Whether Ray was started by this process, with which it ends."""
    node = ray_worker._global_node
    return node is not None and node.is_head()


def scaling(cluster: ClusterConfig) -> ScalingConfig:
    """What Ray Train reserves."""
    workers = cluster.num_workers if cluster.min_workers is None else (cluster.min_workers, cluster.num_workers)
    return ScalingConfig(
        num_workers=workers,
        use_gpu=cluster.use_gpu,
        resources_per_worker=share(cluster),
        elastic_resize_monitor_interval_s=GROW_EVERY_S,
    )


def failure(cluster: ClusterConfig) -> FailureConfig:
    """How often Ray Train brings workers back. It would try to place them without end; here it may not."""
    limit = cluster.max_failures
    return FailureConfig(max_failures=limit, controller_failure_limit=limit)


def quiet_worker() -> None:
    """Call first on a worker: of its frameworks, only errors are heard. They go to Ray's session logs."""
    warnings.simplefilter("ignore")
    for name in ("ray.train", "transformers", "DeepSpeed", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)


def room(cluster: ClusterConfig) -> int | None:
    """Workers that the connected cluster has room for side by side; None if it grows on demand."""
    if cluster.autoscaling or ray_state.get_max_resources_from_cluster_config():
        return None
    return fitting((node["Resources"] for node in ray.nodes() if node["Alive"]), share(cluster))


def fitting(nodes: Iterable[Mapping[str, float]], each: Mapping[str, float]) -> int:
    """Workers that nodes with these resources have room for; a worker needs all of its share on one node."""
    return sum(min(int(node.get(kind, 0) / part + 1e-9) for kind, part in each.items()) for node in nodes)


def share(cluster: ClusterConfig) -> dict[str, float]:
    """What one worker reserves."""
    return {"CPU": cluster.cpus_per_worker} | ({"GPU": 1.0} if cluster.use_gpu else {})


def num_nodes() -> int:
    """Nodes of the connected cluster; this machine, where there is none."""
    return sum(node["Alive"] for node in ray.nodes()) if ray.is_initialized() else 1


def _start(cluster: ClusterConfig) -> None:
    # Ray asks for a token unless RAY_AUTH_MODE says otherwise, and rightly: who reaches its ports runs code
    # as this user. This token is known to this process and its children; by default Ray leaves one in the
    # home directory.
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray.init(
        address="local",
        num_cpus=_cpus_here(),
        num_gpus=_gpus_here() if cluster.use_gpu else 0,
        object_store_memory=OBJECT_STORE_BYTES,
        # Ray Train would ask it whether a driver was killed, to free its workers. Here they die with the
        # driver.
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )


def _join(address: str, variables: Mapping[str, str]) -> None:
    try:
        ray.init(
            address=address,
            runtime_env={"env_vars": dict(variables)},
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        _refuse_address(address, error)


def _check_answers(address: str) -> None:
    """Ray itself tries for a minute."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_TIMEOUT_S).close()
        except OSError as error:
            _refuse_address(address, error)


def _refuse_address(address: str, error: Exception) -> NoReturn:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise ConfigError(
        f"cluster.address = {address}: no Ray cluster can be joined there ({reason}). "
        "Start one (ray start --head), or unset cluster.address and RAY_ADDRESS to start Ray on this machine"
    ) from error


def _check_this_machine(cluster: ClusterConfig) -> None:
    here = {"CPU": _cpus_here(), "GPU": _gpus_here() if cluster.use_gpu else 0}
    _check_fits(cluster, [here], "this machine has")


def _check_cluster(cluster: ClusterConfig) -> None:
    # Ray's own autoscalers, of `ray up` and of KubeRay, do not tell what they can grow to, so the user has to.
    if cluster.autoscaling or ray_state.get_max_resources_from_cluster_config():
        return
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    try:
        _check_fits(cluster, nodes, "this Ray cluster has")
    except ConfigError as error:
        raise ConfigError(f"{error}. If it adds nodes on demand: cluster.autoscaling=true") from None


def _check_fits(cluster: ClusterConfig, nodes: list[dict[str, Any]], there: str) -> None:
    """A worker needs all of its share on one node."""
    (name, workers), each = cluster.needed_workers, cluster.cpus_per_worker
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    if cluster.use_gpu and gpus < workers:
        fewer = f"{name}={gpus}, or " if gpus else ""
        raise ConfigError(
            f"cluster.use_gpu = true: {name} = {workers} needs {workers} GPUs, one each, "
            f"but {there} {gpus}. Set {fewer}cluster.use_gpu=false"
        )
    room = sum(int(node.get("CPU", 0) / each + 1e-9) for node in nodes)
    if room < workers:
        cpus = sum(node.get("CPU", 0) for node in nodes)
        fewer = f"{name}={room} or less, or " if room else ""
        raise ConfigError(
            f"{name} = {workers}: with cluster.cpus_per_worker = {each:g}, {there} room for "
            f"{room} ({cpus:g} CPUs). Set {fewer}cluster.cpus_per_worker lower: "
            "it is a reservation, CPUs can be shared"
        )


def _cpus_here() -> int:
    """CPUs that this process may run on: fewer than the machine has under taskset or in a cpuset."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _gpus_here() -> int:
    import torch

    return torch.cuda.device_count()


def _on_sigterm(handler: Any) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
