"""`stage = "codes"`: what a few numbers can keep of the parts of a text that surprised a trained memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pipelines.config import CODER, EVALUATION, RunConfig, located
from pipelines.drawing import percent
from pipelines.progress import print_where
from pipelines.runs import locked
from pipelines.tracking import TrackedRun
from pipelines.train import complete, work

DOCUMENT = "codes.json"
PARTS = {
    "mean": "what the memory's layers saw, mean",
    "log_variance": "and its variance, logarithm",
    "delta_up": "what was written, its strongest directions",
    "whole_delta_up": "what was written, all of it",
}


def run(config: RunConfig) -> int:
    """Read, fit and report; a run of this name that did not finish starts anew. Returns the exit code."""
    config, console = located(config), Console()
    windows = -(-config.codes.stream_tokens // config.backbone.segment_tokens)
    with locked(config.run_dir):
        document, tracked = work(config, console, job="codes", total=2 * windows, publish=publish)
        print_summary(document, console)
        places = {"Coder": CODER, "Numbers": DOCUMENT}
        print_where({what: config.run_dir / name for what, name in places.items()}, tracked, console)
    return 0


def publish(config: RunConfig, finished: Path, sidecars: Path, tracked: TrackedRun) -> dict[str, Any]:
    """Copy the coder into the run's folder, with what it keeps; file it under the MLflow run."""
    folder = config.run_dir
    shutil.copy(finished / CODER, folder / CODER)
    document = complete(config, json.loads((finished / EVALUATION).read_text()))
    (folder / DOCUMENT).write_text(json.dumps(document, indent=2) + "\n")
    tracked.log_metrics({name: value for name, value in document.items() if name.startswith("codes/")}, step=1)
    tracked.log_artifacts([folder / CODER, folder / DOCUMENT])
    return document


def print_summary(document: dict[str, Any], console: Console) -> None:
    """How much comes out again of what goes in."""
    console.print(
        f"{document['held_out_segments']:,} held-out segments of {document['segment_tokens']:.1f} tokens on average, "
        f"{percent(document['wrote_frac'])} of which wrote; {document['segments']:,} were fitted",
        highlight=False,
    )
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(f"kept by {document['code_size']} numbers", no_wrap=True)
    table.add_column("variance explained", justify="right", no_wrap=True)
    for part, name in PARTS.items():
        table.add_row(name, percent(document[f"codes/{part}_explained"], 1))
    console.print(table)
