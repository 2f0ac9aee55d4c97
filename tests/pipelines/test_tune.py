"""`cortex tune` from end to end: what a sweep leaves, and that one whose driver was killed goes on where it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
from mlflow import MlflowClient

from pipelines.config import load_config
from pipelines.toml_text import dump_toml
from tests import tiny

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STEPS, EVERY, TRIALS = 9, 3, 3
STUDY = f"""
about = "two settings of a tiny memory"
recipe = "RECIPE"
num_trials = {TRIALS}
[overrides]
training.steps = {STEPS}
training.checkpoint_every_steps = {EVERY}
validation.every_steps = {EVERY}
validation.gaps_tokens = [40]
validation.num_examples = 8
evaluation.gaps_tokens = [0, 70]
evaluation.num_examples = 6
evaluation.perplexity_tokens = 1024
cluster.cpus_per_worker = 1.0
[space]
fast_weights.rank = [4, 8]
optimizer.learning_rate = {{ low = 1e-3, high = 1e-1, log = true }}
"""


class Sweep:
    """A sweep of the tiny run, as a command in a process of its own."""

    def __init__(self, out: Path) -> None:
        recipe = tiny.run_config(out, cluster__num_workers=1, tasks__num_pairs=3)
        (out / "tiny.toml").write_text(dump_toml(recipe))
        (out / "study.toml").write_text(STUDY.replace("RECIPE", str(out / "tiny.toml")))
        self.folder, self.uri = out / "study", recipe.tracking_uri
        self.command = [sys.executable, "-m", "pipelines.tune", str(out / "study.toml"), "name=study", f"out_dir={out}"]

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

    def results(self) -> list[dict[str, Any]]:
        file = self.folder / "results.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []

    def finished(self) -> dict[str, float]:
        """When each trial that has finished wrote its evaluation."""
        return {
            file.parent.name: file.stat().st_mtime_ns
            for file in self.folder.glob("trials/*/evaluation.json")
            if '"FINISHED"' in (file.parent / "run.json").read_text()
        }

    def wait_until(self, ready: Callable[[], bool], driver: subprocess.Popen[str], within_s: float = 300.0) -> None:
        deadline = time.monotonic() + within_s
        while not ready():
            assert driver.poll() is None, driver.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def to_its_end(self) -> None:
        done = subprocess.run(self.command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def has_nothing_to_do(self) -> None:
        before = self.finished()
        again = subprocess.run(self.command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
        assert again.returncode == 0 and "trial" in again.stdout and "step 3/" not in again.stdout
        assert self.finished() == before


@pytest.fixture
def sweep(tmp_path: Path, mlflow_database: Callable[[Path], None]) -> Sweep:
    mlflow_database(tmp_path)
    return Sweep(tmp_path)


def ended(sweep: Sweep) -> set[str]:
    """The trials of which Ray Tune has on record that they have ended: what it does not know yet may be said again."""
    try:
        (state,) = [json.loads(file.read_text()) for file in sweep.folder.glob("tune/experiment_state-*.json")]
    except ValueError:  # there is none yet, or it is being written
        return set()
    trials = [json.loads(trial) for trial, _ in state["trial_data"]]
    return {trial["trial_id"] for trial in trials if trial["status"] == "TERMINATED"}


def test_what_a_sweep_leaves_and_that_it_is_not_done_again(sweep: Sweep) -> None:
    sweep.to_its_end()
    _whole(sweep, sweep.finished())
    sweep.has_nothing_to_do()


@pytest.mark.nightly
def test_a_sweep_whose_driver_is_killed_goes_on_where_it_was(sweep: Sweep) -> None:
    """Killed when one trial has finished and another has a checkpoint; then interrupted by SIGTERM; then to its end."""
    driver = sweep.start()
    going = lambda: {r["trial"] for r in sweep.results() if EVERY <= r["step"] < STEPS} - set(sweep.finished())  # noqa: E731
    try:
        sweep.wait_until(lambda: bool(ended(sweep) & set(sweep.finished())) and bool(going()), driver)
        children = psutil.Process(driver.pid).children(recursive=True)
        on_record, known = ended(sweep), len(sweep.results())
        before = {name: when for name, when in sweep.finished().items() if name in on_record}
    finally:
        driver.kill()
    driver.communicate()

    driver = sweep.start()
    try:
        sweep.wait_until(lambda: len(sweep.results()) > known, driver)
        children += psutil.Process(driver.pid).children(recursive=True)
        os.kill(driver.pid, signal.SIGTERM)
        said, _ = driver.communicate(timeout=120)
    finally:
        driver.kill()
    assert driver.returncode == 130, said
    assert said.splitlines()[-1].startswith("cortex: interrupted; to resume: cortex tune "), said
    client = MlflowClient(tracking_uri=sweep.uri)
    (experiment,) = client.search_experiments(filter_string="name = 'cortex'")
    assert "RUNNING" not in {run.info.status for run in client.search_runs([experiment.experiment_id])}

    sweep.to_its_end()
    _whole(sweep, before)
    sweep.has_nothing_to_do()
    # Ray's agents look once a minute whether the process that they serve is there.
    assert psutil.wait_procs(children, timeout=120)[1] == []


def _whole(sweep: Sweep, before: dict[str, float]) -> None:
    result = json.loads((sweep.folder / "sweep.json").read_text())
    rows = result["rows"]
    assert len(rows) == TRIALS and len({row["trial"] for row in rows}) == TRIALS
    assert not [row for row in rows if row["state"] == "failed"]
    finished = sweep.finished()
    assert {name: finished[name] for name in before} == before, "a trial that had finished was done again"
    assert set(finished) == {row["trial"] for row in rows if row["state"] == "finished"}
    seen = Counter((r["trial"], r["step"]) for r in sweep.results())
    assert {(name, step): n for (name, step), n in seen.items() if name in before and n > 1} == {}
    frame = pd.read_csv(sweep.folder / "sweep.csv")
    assert set(frame["fast_weights.rank"]) <= {4, 8} and len(frame) == TRIALS
    best = rows[0]
    assert best["state"] == "finished" and best["loss_nats"] == min(
        r["loss_nats"] for r in rows if r["state"] == "finished"
    )
    recipe = load_config(sweep.folder / "best.toml")
    assert recipe.fast_weights.rank == best["sample"]["fast_weights.rank"] and recipe.training.steps == 6
    for name in ("sensitivity.png", "parallel.png"):
        assert (sweep.folder / name).read_bytes().startswith(b"\x89PNG")
    _tracked(sweep, rows, best)


def _tracked(sweep: Sweep, rows: list[dict[str, Any]], best: dict[str, Any]) -> None:
    """One parent, a child per trial, every step of every child once, the best one tagged."""
    client = MlflowClient(tracking_uri=sweep.uri)
    (experiment,) = client.search_experiments(filter_string="name = 'cortex'")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = {run.info.run_id: run for run in runs if run.info.run_id != parent.info.run_id}
    assert parent.info.status == "FINISHED" and parent.data.metrics["best/loss_nats"] == best["loss_nats"]
    assert set(children) == {row["mlflow_run_id"] for row in rows}
    assert [id_ for id_, run in children.items() if run.data.tags.get("sweep.best")] == [best["mlflow_run_id"]]
    for row in rows:
        run = children[row["mlflow_run_id"]]
        assert run.info.status == ("FINISHED" if row["state"] == "finished" else "KILLED")
        lines = (sweep.folder / "trials" / row["trial"] / "events.jsonl").read_text().splitlines()
        events = [json.loads(line) for line in lines]
        assert {event["mlflow_run_id"] for event in events} == {row["mlflow_run_id"]}
        assert {event["run"] for event in events} == {row["trial"]} and events[0]["event"] == "started"
        assert (events[-1]["event"] == "finished") == (row["state"] == "finished"), events
        assert {"workers started", "checkpoint written"} <= {event["event"] for event in events}
        steps = [point.step for point in client.get_metric_history(row["mlflow_run_id"], "loss")]
        assert steps == sorted(set(steps)) and steps[-1] >= row["step"]
        assert run.data.params["fast_weights.rank"] == str(row["sample"]["fast_weights.rank"])
