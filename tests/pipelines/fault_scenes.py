"""Commands, nodes and servers that can be taken away, and what a run is compared by afterwards."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from mlflow import MlflowClient
from ray._private.node import Node
from ray.cluster_utils import Cluster

from cortex_core.training.checkpoint import TENSORS
from pipelines.config import RunConfig
from pipelines.toml_text import dump_toml
from tests import tiny
from tests.pipelines.train_scenes import (
    LONG,
    ROOT,
    in_mlflow,
    logged_once,
    recorded,
    sidecars,
)

SMALL = {"object_store_memory": 80 * 2**20}


def losses(config: RunConfig) -> dict[int, float]:
    """Of every step, as MLflow has them."""
    (run,) = in_mlflow(config)
    history = MlflowClient(tracking_uri=config.tracking_uri).get_metric_history(run.info.run_id, "loss")
    return {point.step: point.value for point in history}


def as_if_undisturbed(config: RunConfig, undisturbed: RunConfig) -> None:
    """Every step has read the same sequences with the same weights, once, and has been logged once."""
    logged_once(config, LONG)
    assert losses(config) == losses(undisturbed)
    assert tiny.same(sidecars(config), sidecars(undisturbed))


def cut_newest(config: RunConfig) -> None:
    """Half of the newest checkpoint is all that came to the disk."""
    newest = max(recorded(config) or on_this_machine(config))
    with (newest / TENSORS).open("r+b") as file:
        file.truncate((newest / TENSORS).stat().st_size // 2)


def on_this_machine(config: RunConfig) -> set[Path]:
    """Checkpoints that Ray has on record in the run's own folder."""
    said = next((config.run_dir / "checkpoints").glob("attempt-*/checkpoint_manager_snapshot.json"))
    return {folder for folder in said.parent.glob("checkpoint_2*") if folder.name in said.read_text()}


class Command:
    """`cortex train` in a process of its own."""

    def __init__(self, config: RunConfig, *program: str, **variables: str) -> None:
        self.file, self.said = Path(config.out_dir) / "mine.toml", Path(config.out_dir) / "said"
        self.file.write_text(dump_toml(config))
        with self.said.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, *(program or ("-m", "pipelines.train")), str(self.file)], cwd=ROOT, env=os.environ | variables,
                stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def wait_until(self, ready: Callable[[], bool], within_s: float = 240.0) -> None:
        deadline = time.monotonic() + within_s
        while not ready():
            assert self.process.poll() is None and time.monotonic() < deadline, self.said.read_text()
            time.sleep(0.05)

    def kill(self) -> list[psutil.Process]:
        """Nothing of it is told beforehand. Returns the processes that it had started."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait()
        return children

    def end(self) -> str:
        """What it has said, when it has ended well."""
        assert self.process.wait(timeout=240) == 0, self.said.read_text()
        return self.said.read_text()


def hosts(node: Node, what: str) -> list[psutil.Process]:
    """Processes of a node's that do a part of the run."""
    return named(what, psutil.Process(node.all_processes["raylet"][0].process.pid))


def named(what: str, above: psutil.Process) -> list[psutil.Process]:
    """Processes below another one, by a part of their command."""
    found = []
    for process in above.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # one that has just ended, or is not yet buried
            if what in " ".join(process.cmdline()):
                found.append(process)
    return found


@contextlib.contextmanager
def nodes_here(count: int) -> Iterator[Cluster]:
    """A head without CPUs, and nodes of one CPU each; all on this machine, and asking for the session's token."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **SMALL})
    try:
        for _ in range(count):
            cluster.add_node(num_cpus=1, **SMALL)
        yield cluster
    finally:
        cluster.shutdown()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def tracking_server(database: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """An MLflow server on a SQLite database: its address, and what kills it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--backend-store-uri", database]
    command = [sys.executable, "-m", "mlflow", "server", *options]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    server = psutil.Popen(command, env=os.environ | quiet, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def kill() -> None:
        for process in [*server.children(recursive=True), server]:
            process.kill()
            process.wait()

    try:
        deadline = time.monotonic() + 120
        while not listens(port):
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", kill
    finally:
        if server.is_running():
            kill()
