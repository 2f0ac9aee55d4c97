"""Rows about a user's first hour: from an empty clone to an installed, shown and tested project. Slow, so opt-in."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Set
from pathlib import Path

import psutil

from tests.benchmarks.child import ROOT
from tests.benchmarks.row import Row
from tests.benchmarks.rows.demo import Demo

TARGETS = {"setup": ["make", "setup"], "demo": ["make", "demo"], "test": ["make", "test"], "ci": [".ci/run"]}
GOAL_SECONDS: dict[str, float | None] = {"setup": 240, "demo": 480, "test": None, "ci": 1200}
MEMORY_ROW, MEMORY_GOAL_GB = "demo_peak_memory_gb", 6.0
ROWS = (*(f"{target}_seconds" for target in TARGETS), MEMORY_ROW)
SAMPLE_S, SHOWN_LINES = 0.5, 15
OF_THE_CALLER = frozenset(
    [
        "MAKEFLAGS",
        "MFLAGS",
        "MAKEOVERRIDES",
        "MAKELEVEL",
        "VENV",
        "VIRTUAL_ENV",
        "PYTHONPATH",
        "ARGS",
        "ROW",
        "RUNS",
        "RECIPE",
    ]
)
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in OF_THE_CALLER}
"""What a user's shell would have: as this process was started, but for what a make that started it has set."""


def wall_clock(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Seconds of `make setup`, `make demo`, `make test` and `.ci/run`, one after the other, in a fresh clone of HEAD.

    What is not committed is not measured. `make setup` runs in any case, since the others need it; it takes packages
    from the network or from pip's cache, whatever is nearer. demo_peak_memory_gb: twice a second, the proportional set
    sizes (shared pages count once) of the demo's whole process tree are added up, in 10^9 bytes; the largest sum
    counts.
    """
    with tempfile.TemporaryDirectory(prefix="cortex-clone-") as scratch:
        clone = Path(scratch) / "cortex"
        subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(clone)], check=True)
        for target, command in TARGETS.items():
            names = {f"{target}_seconds"} | ({MEMORY_ROW} if target == "demo" else set())
            if target != "setup" and not names & wanted:
                continue
            seconds, peak_gb = _timed(command, clone, watched=MEMORY_ROW in names & wanted)
            if f"{target}_seconds" in wanted:
                yield Row(f"{target}_seconds", seconds, GOAL_SECONDS[target], "lower", "s", 1, seconds=seconds)
            if MEMORY_ROW in names & wanted:
                yield Row(MEMORY_ROW, peak_gb, MEMORY_GOAL_GB, "lower", "GB", 1, seconds=seconds)


def _timed(command: list[str], clone: Path, *, watched: bool) -> tuple[float, float]:
    """Seconds of a command, and its peak memory (10^9 bytes) if it is watched, which takes a few percent of the time.

    Raises RuntimeError, with its last output, if it fails.
    """
    log = clone.with_name("output.log")
    start = time.perf_counter()
    with log.open("wb") as said:
        process = subprocess.Popen(
            command, cwd=clone, env=ENVIRONMENT, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            with PeakMemory(process.pid) if watched else contextlib.nullcontext(PeakMemory(0)) as memory:
                code = process.wait()
        except BaseException:  # interrupted: nothing that was started here goes on
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise
    seconds = time.perf_counter() - start
    if code:
        end = log.read_text(errors="replace").splitlines()[-SHOWN_LINES:]
        raise RuntimeError("\n".join([f"{' '.join(command)} failed in a fresh clone (exit {code}):", *end]))
    return seconds, memory.peak_bytes / 1e9


class PeakMemory:
    """Within the block, samples the memory of a process and all its descendants."""

    def __init__(self, pid: int) -> None:
        self.peak_bytes = 0
        self._pid, self._done = pid, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *exit_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_S):
            self.peak_bytes = max(self.peak_bytes, tree_bytes(self._pid))


def tree_bytes(pid: int) -> int:
    """Proportional set sizes of a process and its descendants, added up; 0 when it is gone."""
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    total = 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # ended meanwhile
            continue
    return total
