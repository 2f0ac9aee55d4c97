"""The same training through Ray Train and in a bare process; `speed.py` makes a row of it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ray.train import Checkpoint, UserCallback

from pipelines import cluster, worker
from pipelines.config import RunConfig, load_config
from pipelines.launch import launch
from pipelines.runs import Run
from tests.benchmarks import child

REPORT_STEPS, REPORTS = 5, 3
COMMON = {
    "training.steps": REPORT_STEPS * REPORTS,
    "training.report_every_steps": REPORT_STEPS,
    "training.short_frac": 0.0,  # all steps over whole segments, as most of a run
    "evaluation.num_examples": 2,  # only training is timed
    "evaluation.gaps_tokens": (0,),
    "evaluation.perplexity_tokens": 0,
    "data.max_bytes": 4_000_000,
    "cluster.address": None,
    "cluster.cpus_per_worker": 1.0,
    "cluster.use_gpu": False,
}
PIPELINE = COMMON | {"cluster.num_workers": 1, "sharding.stage": 3}
BARE = COMMON | {"cluster.num_workers": 0, "sharding.stage": 0, "sharding.offload": "none"}


def interleaved(config: RunConfig, pairs: int) -> list[float]:
    """seconds(bare process) / seconds(pipeline) of the timed steps, pair by pair, who begins alternating."""
    settings = config.model_dump()
    pipeline = load_config(None, _flat(settings) | PIPELINE)
    found = []
    os.environ.setdefault("RAY_worker_niceness", "0")
    with tempfile.TemporaryDirectory() as scratch, cluster.connect(pipeline.cluster):
        for number in range(pairs):
            ways = {
                "pipeline": lambda number=number: _through_ray(pipeline, Path(scratch), number),
                "bare": lambda: child.run(f"{__name__}:bare_process", settings=settings)[0],
            }
            seconds = {way: ways[way]() for way in sorted(ways, reverse=bool(number % 2))}
            found.append(seconds["bare"] / seconds["pipeline"])
    return found


def bare_process(settings: dict[str, Any]) -> float:
    """In a process of its own: seconds of the timed steps, without Ray and with the whole backbone."""
    config = load_config(None, _flat(settings) | BARE)
    reports: list[Mapping[str, float]] = []
    edge = worker.Edge(0, 1, lambda metrics, folder: reports.append(metrics), nullcontext)
    worker.train(config, edge)
    return _timed_seconds(reports)


def _through_ray(config: RunConfig, scratch: Path, number: int) -> float:
    notes = scratch / f"{number}.jsonl"
    run = Run(scratch / "run", number, "RUNNING")
    shutil.rmtree(launch("train", config, run, [NoteReports(str(notes))]))
    return _timed_seconds([json.loads(line) for line in notes.read_text().splitlines()])


class NoteReports(UserCallback):
    """Writes what the worker reports to a file: it runs in the process of Ray Train's controller."""

    def __init__(self, path: str) -> None:
        self.path = path

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """Called with one dict per rank."""
        with Path(self.path).open("a") as file:
            file.write(json.dumps(metrics[0]) + "\n")


def _timed_seconds(reports: list[Mapping[str, float]]) -> float:
    """Seconds of all training steps but those of the first report. Both ways read the same tokens in the same steps."""
    rates = [report["throughput/steps_per_s"] for report in reports if "throughput/steps_per_s" in report]
    assert len(rates) == REPORTS, f"{len(rates)} reports of training steps, expected {REPORTS}"
    return sum(REPORT_STEPS / rate for rate in rates[1:])


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names, as overrides have them; what is None is left to its default."""
    flat = {}
    for name, value in settings.items():
        inner = {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
        flat |= {key: item for key, item in inner.items() if item is not None}
    return flat
