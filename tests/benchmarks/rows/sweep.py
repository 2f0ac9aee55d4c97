"""Rows about sweeps: how long one takes that is killed on the way, and what Ray adds to the trials' own time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from tests.benchmarks import child
from tests.benchmarks.child import ROOT
from tests.benchmarks.row import Row
from tests.benchmarks.rows.demo import Demo

KILLED_ROWS = ("sweep_seconds", "sweep_finished_trials_repeated")
OVERHEAD_ROW = "sweep_overhead_ratio"
STUDY = """
about = "rank, decay and learning rate of the demo"
num_trials = 16
[space]
fast_weights.rank = [4, 8, 16, 32]
fast_weights.decay = [0.9, 0.95, 0.98, 0.995]
optimizer.learning_rate = { low = 1e-3, high = 1e-2, log = true }
"""
SHORT = """
about = "eight short trials"
search = "grid"
grid_points = 2
[overrides]
training.steps = 60
[space]
fast_weights.rank = [8, 16]
fast_weights.decay = [0.95, 0.98]
optimizer.learning_rate = { low = 2e-3, high = 5e-3, log = true }
"""
KILLED_AFTER = 4
"""Trials that have ended when the driver is killed."""
STATE_S = 5.0
"""Ray Tune saves its state every two seconds: what ended within this time may be done again."""


def sweep_killed_and_restored(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Seconds that `cortex tune` takes for 16 trials of the demo, its driver killed by SIGKILL once on the way.

    Rank x decay x learning rate, 80 steps, ASHA. The command is started again; the second row counts finished trials
    that were then done again.
    All of the time counts, from the first start of the command to the end of the second. The trials run side by side, one
    worker each, as many as this machine has CPUs.
    """
    with tempfile.TemporaryDirectory(prefix="cortex-sweep-") as scratch:
        folder = Path(scratch) / "sweep"
        command = _command(Path(scratch), STUDY)
        start = time.perf_counter()
        first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            _wait_for(lambda: _ended(folder) >= KILLED_AFTER, first)
            _wait_for(lambda: time.time() - max(_finished(folder).values(), default=time.time()) > STATE_S, first)
        finally:
            first.kill()
            first.wait()
        before = _finished(folder)
        _to_the_end(command)
        seconds = time.perf_counter() - start
        rows, after = json.loads((folder / "sweep.json").read_text())["rows"], _finished(folder)
    repeated = sum(after[name] != when for name, when in before.items())
    n = len(rows)
    yield Row(KILLED_ROWS[0], seconds, 900, "lower", "s", n, seconds=seconds)
    yield Row(KILLED_ROWS[1], float(repeated), 0, "lower", "", len(before))


def sweep_overhead_ratio(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Seconds of a sweep of 8 short trials (a grid, nothing stopped early), over the sum of the trials' own times.

    The command's time is all of it: Ray's start, the trials, side by side on this machine's CPUs, their reports, the
    table. A trial's own time is that of `worker.train` with the same settings in one bare process that has imported
    everything: loading, training, validations, evaluation. Four of the trials are timed before, four after the sweep.
    """
    from pipelines.sweep_plan import plan, trial_config

    with tempfile.TemporaryDirectory(prefix="cortex-sweep-") as scratch:
        command = _command(Path(scratch), SHORT, "--no-early-stop")
        planned = plan(str(Path(scratch) / "study.toml"), [f"out_dir={scratch}", "name=sweep"])
        points: list[dict[str, Any]] = [{}]
        for name, of in planned.study.space.items():
            points = [point | {name: value} for point in points for value in of.grid(2)]
        configs = [
            trial_config(planned.config, "bare", point | {"cluster.num_workers": 0}).model_dump_json()
            for point in points
        ]
        half = len(configs) // 2
        bare = _bare(configs[:half])
        start = time.perf_counter()
        _to_the_end(command)
        seconds = time.perf_counter() - start
        bare += _bare(configs[half:])
    yield Row(OVERHEAD_ROW, seconds / sum(bare), 1.3, "lower", "", len(configs), seconds=seconds + sum(bare))


def _bare(configs: list[str]) -> list[float]:
    (seconds,) = child.run(f"{__name__}:timed", configs=configs)
    return seconds


def timed(configs: list[str]) -> list[float]:
    """Seconds of each run, one after the other in this process."""
    from contextlib import nullcontext

    from pipelines import worker
    from pipelines.config import RunConfig

    edge = worker.Edge(0, 1, lambda metrics, folder: None, lambda: nullcontext(None))
    seconds = []
    for text in configs:
        start = time.perf_counter()
        worker.train(RunConfig.model_validate_json(text), edge)
        seconds.append(time.perf_counter() - start)
    return seconds


def _command(out: Path, study: str, *options: str) -> list[str]:
    file = out / "study.toml"
    file.write_text(study)
    return [sys.executable, "-m", "pipelines.tune", str(file), f"out_dir={out}", "name=sweep", *options]


def _to_the_end(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"the sweep ended with {done.returncode}:\n{done.stdout[-2000:]}")


def _wait_for(ready: Callable[[], bool], process: subprocess.Popen[Any]) -> None:
    while not ready():
        if process.poll() is not None:
            raise RuntimeError(f"the sweep ended with {process.returncode} before it was killed")
        time.sleep(0.2)


def _ended(folder: Path) -> int:
    """Trials that Ray Tune has on record as ended."""
    found = 0
    for state in folder.glob("tune/experiment_state-*.json"):
        try:
            trials = json.loads(state.read_text())["trial_data"]
        except (OSError, ValueError, KeyError):  # it is being written
            continue
        found = sum(json.loads(trial)["status"] == "TERMINATED" for trial, _ in trials)
    return found


def _finished(folder: Path) -> Mapping[str, float]:
    """When each trial that has taken all its steps wrote its evaluation."""
    return {
        run.parent.name: os.stat(run.parent / "evaluation.json").st_mtime
        for run in folder.glob("trials/*/run.json")
        if json.loads(run.read_text())["state"] == "FINISHED"
    }
