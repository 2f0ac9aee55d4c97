"""Rows about the time before the first step: how long a run on this machine takes to get there, and where it goes."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Set

from tests.benchmarks import pairs
from tests.benchmarks.child import ROOT
from tests.benchmarks.row import Row
from tests.benchmarks.rows.demo import Demo

PHASES = {
    "startup_command_seconds": "opening MLflow",
    "startup_mlflow_seconds": "starting the cluster",
    "startup_ray_seconds": "loading the backbone",
    "startup_first_step_seconds": "training",
}
"""What is measured, and the line in the command's output at which it ends: imports and checks of the command; MLflow's
database; Ray, its controller and its workers, up to their first word; backbone, text, calibration and one step."""
TOTAL = "startup_seconds"
ROWS = (TOTAL, *PHASES)
GOAL_S, REPEATS = 25.0, 3


def startup(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Seconds from `cortex train demo` to its first optimizer step, with two workers and ZeRO-3, in total and by phase.

    Each of three runs has a new folder, so MLflow's database is made as well; each is ended after its first report.
    Median, smallest to largest.
    """
    times = [_one() for _ in range(REPEATS)]
    for name in ROWS:
        found = pairs.median([one[name] for one in times])
        goal = GOAL_S if name == TOTAL else None
        yield Row(name, found.value, goal, "lower", "s", found.n, found.low, found.high)


def _one() -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="cortex-startup-") as scratch:
        command = [
            sys.executable, "-u", "-m", "pipelines.train", "demo", f"out_dir={scratch}", "training.report_every_steps=1",
        ]  # fmt: skip
        ends, start = dict[str, float](), time.perf_counter()
        waiting, said = list(PHASES.items()), list[str]()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                said.append(line)
                if waiting and line.removeprefix("demo: ").startswith(waiting[0][1]):
                    ends[waiting.pop(0)[0]] = time.perf_counter() - start
                if not waiting:
                    break
        finally:
            process.terminate()
            process.communicate()
    if waiting:
        raise RuntimeError(f"the run ended before {waiting[0][1]!r}:\n{''.join(said[-15:])}")
    before = 0.0
    parts = {}
    for name, end in ends.items():
        parts[name], before = end - before, end
    return parts | {TOTAL: before}
