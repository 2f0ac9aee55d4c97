"""`cortex sleep`: what a trained memory is told by day becomes what the model knows without it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from cortex_core.training.dreams import MEMORIES
from pipelines.config import EVALUATION, SIDECARS_FOLDER, RunConfig, located
from pipelines.dream_report import write_dreamed
from pipelines.progress import print_where
from pipelines.runs import locked
from pipelines.sleep_report import DOCUMENT, DREAMED, PICTURE, headline, print_summary, write
from pipelines.tracking import TrackedRun
from pipelines.train import complete, replace_folder, work


def run(config: RunConfig) -> int:
    """Live, sleep, ask and report; resumes a run of this name that did not finish. Returns the exit code."""
    config, console = located(config), Console()
    days = -(-config.life.num_facts // config.life.facts_per_day)
    with locked(config.run_dir):
        document, tracked = work(config, console, job="sleep", total=days, publish=publish)
        print_summary(document, console)
        places = {"Picture": PICTURE, "Numbers": DOCUMENT, "Sidecars": SIDECARS_FOLDER}
        places |= {"Dreams": DREAMED} if (config.run_dir / DREAMED).is_file() else {}
        print_where({what: config.run_dir / name for what, name in places.items()}, tracked, console)
    return 0


def publish(config: RunConfig, finished: Path, sidecars: Path, tracked: TrackedRun) -> dict[str, Any]:
    """Copy the sidecars with their slow weights into the run's folder, with what was asked; file it under the run."""
    folder = config.run_dir
    replace_folder(sidecars, folder / SIDECARS_FOLDER)
    shutil.copy(finished / MEMORIES, folder / MEMORIES)
    document = complete(config, json.loads((finished / EVALUATION).read_text()))
    written = [*write(document, folder), *write_dreamed(config, finished, folder)]
    tracked.log_metrics(headline(document), step=len(document["days"]))
    tracked.log_table(document["rows"], "sleep_rows.json")
    tracked.log_artifacts([*written, folder / SIDECARS_FOLDER])
    return document


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["sleep", *sys.argv[1:]]))
