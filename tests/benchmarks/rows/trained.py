"""Runs that rows train for themselves: a recipe with a few settings changed, beside the demo's own folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tests.benchmarks.child import ROOT

Settings = Mapping[str, Any]
"""By dotted name."""
IN_ONE_PROCESS = {"cluster.num_workers": 0, "cluster.worker_threads": 1}
"""One process per run, and a run per core: the same weights as with workers, sooner than one run after the other."""


def evaluations(
    out_dir: Path, runs: Mapping[str, Settings], recipes: Mapping[str, str] = MappingProxyType({})
) -> dict[str, dict[str, Any]]:
    """By name of the run, the evaluation of `cortex train` with its recipe (else the demo's) and its settings.

    What is finished is not trained again.
    Raises RuntimeError, with the last words of the first run that failed, once the others have ended.
    """
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = pool.map(lambda name: _evaluation(out_dir, name, recipes.get(name, "demo"), runs[name]), runs)
    return dict(zip(runs, found, strict=True))


def shares(document: Mapping[str, Any], gaps: Iterable[int]) -> list[float]:
    """By example, the share of its questions at these gaps, under all fillers, that were answered with memory on.

    An `evaluation.json` asks about the same facts at every gap and under every filler: of what is pooled over those,
    the examples are independent, the answers are not.
    """
    wanted = {*gaps}
    cells = [
        [letter == "1" for letter in letters]
        for row, letters in zip(document["rows"], document["outcomes"], strict=True)
        if row["memory"] == "on" and row["gap_tokens"] in wanted
    ]
    return [sum(answers) / len(cells) for answers in zip(*cells, strict=True)]


def _evaluation(out_dir: Path, name: str, recipe: str, settings: Settings) -> dict[str, Any]:
    from pipelines.runs import STATE_FILE

    folder = out_dir / name
    state = folder / STATE_FILE
    if not (state.is_file() and json.loads(state.read_text())["state"] == "FINISHED"):
        given = [f"{key}={json.dumps(value)}" for key, value in (IN_ONE_PROCESS | {**settings}).items()]
        command = [sys.executable, "-m", "pipelines.train", recipe, f"name={name}", f"out_dir={out_dir}", *given]
        done = subprocess.run(
            command, check=False, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}")
    return json.loads((folder / "evaluation.json").read_text())
