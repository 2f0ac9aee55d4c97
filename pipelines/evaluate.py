"""`cortex evaluate`: ask a trained memory again, under its run's own settings or others."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console

from pipelines import cluster
from pipelines.config import EVALUATION, SIDECARS_FOLDER, RunConfig, located
from pipelines.launch import launch
from pipelines.progress import Progress
from pipelines.report import print_summary, write_report
from pipelines.runs import Run
from pipelines.train import complete


def run(config: RunConfig, run_dir: Path) -> int:
    """Evaluate `run_dir`/sidecars and write the report into `run_dir`/evaluation. Returns the exit code."""
    config, console, out = located(config), Console(), run_dir / "evaluation"
    with Progress(console, total=1, run=config.name) as progress:
        progress.phase("starting the cluster")
        with cluster.connect(config.cluster):
            finished = launch(
                "evaluate",
                config,
                Run(out.absolute(), 0, "RUNNING"),
                [progress.callback()],
                (run_dir / SIDECARS_FOLDER).absolute(),
            )
        document = complete(config, json.loads((finished / EVALUATION).read_text()))
        write_report(document, out, None)
    print_summary(document, console)
    console.print(f"Report    {out / 'report.html'}", soft_wrap=True, highlight=False)
    return 0


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["evaluate", *sys.argv[1:]]))
