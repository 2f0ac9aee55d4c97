"""`ray job submit`: every command as a job of a real head node with its job server, stopped, resumed, and read in a log."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from pipelines.config import RunConfig
from pipelines.toml_text import dump_toml
from tests import tiny
from tests.pipelines.train_scenes import happened, has_checkpoint, logged_once, state

pytestmark = [pytest.mark.slow, pytest.mark.nightly]

ROOT, RAY = Path(__file__).parents[2], [sys.executable, "-m", "ray.scripts.scripts"]
STEPS, LIMIT_MB = 12, 12.0


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Head:
    """A head node with two CPUs, and a shell that knows its address and its token."""

    def __init__(self, folder: Path) -> None:
        port, dashboard, agent = free_ports(3)
        self.folder = folder
        self.shell = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # whose python the jobs run
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "PYTHONWARNINGS": "ignore",
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        }  # fmt: skip
        command = [
            *RAY, "start", "--head", "--block", "--num-cpus=2", f"--port={port}", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}", f"--temp-dir={folder}", "--disable-usage-stats",
            "--object-store-memory=268435456",
        ]  # fmt: skip
        self.log = folder / "head.log"
        with self.log.open("wb") as said:
            self.process = subprocess.Popen(
                command, env=self.shell, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
            )

    def submit(self, job: str, *command: str, wait: bool = True, **more: Any) -> subprocess.CompletedProcess[str]:
        """`ray job submit`, from the repository, as a user types it. With `wait` until the job has ended."""
        options = [] if wait else ["--no-wait"]
        return self.ray("job", "submit", "--working-dir", ".", "--submission-id", job, *options, "--", *command, **more)

    def ray(self, *arguments: str, timeout_s: float = 300.0) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*RAY, *arguments], cwd=ROOT, env=self.shell, capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + 120
        while self.ray("job", "submit", "--no-wait", "--", "true").returncode:  # it answers before it can start a job
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()

    def stop(self) -> None:
        processes = [self.process, *psutil.Process(self.process.pid).children(recursive=True)]
        self.process.terminate()
        self.process.wait(timeout=60)
        _, alive = psutil.wait_procs(processes[1:], timeout=60)
        for process in alive:
            process.kill()
        assert not alive


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    # Ray's sockets lie below it, and their paths may have 107 characters.
    one = Head(Path(tmp_path_factory.mktemp("r")))
    try:
        one.wait_until_up()
        yield one
    finally:
        one.stop()


def run_of(out: Path, **settings: object) -> RunConfig:
    config = tiny.run_config(
        out,
        **{"training__steps": STEPS, "cluster__num_workers": 2, "cluster__cpus_per_worker": 0.5, "seed": 2} | settings,
    )
    (out / "tiny.toml").write_text(dump_toml(config))
    return config


def training(config: RunConfig) -> list[str]:
    return ["python", "-m", "pipelines.train", str(Path(config.out_dir) / "tiny.toml")]


def test_a_run_as_a_job_and_its_evaluation(head: Head, tmp_path: Path, mlflow_database: Callable[[Path], None]) -> None:
    mlflow_database(tmp_path)
    config = run_of(tmp_path)
    done = head.submit("whole", *training(config))
    assert done.returncode == 0, done.stdout + done.stderr
    logged_once(config, STEPS)
    log = head.ray("job", "logs", "whole").stdout.partition("Running entrypoint")[2]  # before it, Ray speaks
    assert f"tiny: training  step {STEPS}/{STEPS}  loss " in log and "evaluating" in log and "Report    " in log
    assert "tiny: workers started: 2, on " in log and "tiny: finished" in log
    assert "\r" not in log and "\x1b" not in log and "Traceback" not in log and "WARNING" not in log
    assert "(pid=" not in log and len(log.splitlines()) < 80, log

    asked = head.submit(
        "asked", "python", "-m", "pipelines.evaluate", str(config.run_dir), "evaluation.gaps_tokens=0,20"
    )
    assert asked.returncode == 0, asked.stdout + asked.stderr
    document = config.run_dir / "evaluation" / "evaluation.json"
    assert {row["gap_tokens"] for row in json.loads(document.read_text())["rows"]} == {0, 20}


def test_what_is_uploaded_is_small(head: Head) -> None:
    """The sources and the small backbone; nothing that git ignores, nothing that no job reads."""
    packages = {
        path for path in head.folder.glob("session_*/runtime_resources/working_dir_files/_ray_pkg_*") if path.is_dir()
    }
    assert packages, "no job has run before"
    for package in packages:
        names = {path.name for path in package.iterdir()}
        assert {"pipelines", "cortex_core", "tune_spaces"} <= names
        assert not names & {".venv", "runs", ".git", "mlruns", "tests", "docs"}
        assert sum(path.stat().st_size for path in package.rglob("*") if path.is_file()) < LIMIT_MB * 1e6


def test_a_job_that_is_stopped_is_killed_in_mlflow_and_resumes(
    head: Head, tmp_path: Path, mlflow_database: Callable[[Path], None]
) -> None:
    mlflow_database(tmp_path)
    config = run_of(tmp_path)
    assert head.submit("stopped", *training(config), wait=False).returncode == 0
    deadline = time.monotonic() + 200
    while not has_checkpoint(config):
        assert time.monotonic() < deadline, head.ray("job", "logs", "stopped").stdout
        time.sleep(0.1)
    head.ray("job", "stop", "stopped")
    while "STOPPED" not in head.ray("job", "status", "stopped").stdout.upper():
        assert time.monotonic() < deadline
    run_id = str(state(config)["mlflow_run_id"])
    assert MlflowClient(tracking_uri=config.tracking_uri).get_run(run_id).info.status == "KILLED"
    assert state(config)["state"] == "KILLED" and "interrupted" in happened(config)
    again = head.submit("resumed", *training(config))
    assert again.returncode == 0, again.stdout + again.stderr
    assert ", from step " in again.stdout
    assert state(config)["mlflow_run_id"] == run_id
    logged_once(config, STEPS)


def test_a_sweep_as_a_job(head: Head, tmp_path: Path, mlflow_database: Callable[[Path], None]) -> None:
    mlflow_database(tmp_path)
    run_of(tmp_path, training__steps=4, cluster__num_workers=1, tasks__num_pairs=3)
    (tmp_path / "study.toml").write_text(
        f'recipe = "{tmp_path / "tiny.toml"}"\nnum_trials = 2\n[overrides]\ntraining.steps = 4\nvalidation.every_steps = 2\n'
        "validation.gaps_tokens = [20]\nvalidation.num_examples = 4\nevaluation.gaps_tokens = [0, 20]\n"
        "evaluation.num_examples = 4\nevaluation.perplexity_tokens = 0\n[space]\nfast_weights.rank = [4, 8]\n"
    )
    command = ["python", "-m", "pipelines.tune", str(tmp_path / "study.toml"), f"out_dir={tmp_path}", "--no-early-stop"]
    done = head.submit("sweep", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "study" / "sweep.json").read_text())["rows"]
    assert [row["state"] for row in rows] == ["finished", "finished"]


def test_a_backbone_is_made_by_a_job(head: Head, tmp_path: Path) -> None:
    words = [f"{a}{b}{c}" for a in ("ba", "ko", "lu", "mi") for b in ("na", "re", "so", "ti") for c in "nrst"]
    (tmp_path / "text").mkdir()
    for number in range(30):
        (tmp_path / "text" / f"{number}.txt").write_text(" ".join(words[number:] + words[:number]) * 3)
    (tmp_path / "tiny.toml").write_text(
        'name = "tiny"\nsteps = 2\nbatch_size = 2\nscore_examples = 2\n[decoder]\nvocab_size = 700\nhidden_size = 32\n'
        f'num_layers = 2\nmlp_size = 32\nwindow_tokens = 256\n[data]\nheld_out_frac = 0.2\npath = "{tmp_path / "text"}"\n'
    )
    command = ["python", "-m", "pipelines.pretrain", str(tmp_path / "tiny.toml"), "--out", str(tmp_path / "model")]
    done = head.submit("pretrain", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_wrong_input_is_a_line_in_the_log(head: Head) -> None:
    done = head.submit("wrong", "python", "-m", "pipelines.train", "demo", "fast_weights.rank=0")
    assert done.returncode != 0
    said = [line for line in head.ray("job", "logs", "wrong").stdout.splitlines() if line.startswith("cortex: ")]
    assert said == ["cortex: fast_weights.rank = 0: must be at least 1 (default 16)"]
