"""`cortex train`: the driver of one run, and the command of a submitted job (`python -m pipelines.train RECIPE …`).

It reads as the run goes: open the folder, start the cluster, train and evaluate on the workers, publish what came out.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console

from cortex_core.training.checkpoint import step_of
from pipelines import cluster, sleep_report, tracking
from pipelines.config import EVALUATION, LIFE, MEMORIES, SIDECARS_FOLDER, RunConfig, located
from pipelines.disk import room_for
from pipelines.events import EventCallback, EventLog
from pipelines.launch import Job, launch
from pipelines.progress import Progress, line_printer, print_where
from pipelines.report import print_summary, write_report
from pipelines.runs import Run, locked, open_run
from pipelines.tracking import TrackedRun

Publish = Callable[[RunConfig, Path, Path, TrackedRun], dict[str, Any]]
"""(config, folder of the last checkpoint, of the sidecars, run in MLflow) to what the run has found."""
REPORTED_VERSIONS = ("cortex-memory", "torch", "transformers", "ray", "deepspeed", "mlflow")


def run(config: RunConfig) -> int:
    """Train, evaluate and report; resumes a run of this name that did not finish. Returns the exit code."""
    config, console = located(config), Console()
    with locked(config.run_dir):
        document, tracked = work(config, console)
        print_summary(document, console)
        places = {"Report": "report.html", "Picture": "reach.png", "Sidecars": SIDECARS_FOLDER}
        if config.life.beside_training:
            sleep_report.print_summary(json.loads((config.run_dir / sleep_report.DOCUMENT).read_text()), console)
            places |= {"Life": sleep_report.PICTURE}
            places |= {"Dreams": sleep_report.DREAMED} if (config.run_dir / sleep_report.DREAMED).is_file() else {}
        print_where({what: config.run_dir / name for what, name in places.items()}, tracked, console)
    return 0


def work(
    config: RunConfig,
    console: Console,
    *,
    parent_run_id: str | None = None,
    sidecars: Path | None = None,
    job: Job | None = None,
    total: int | None = None,
    publish: Publish | None = None,
) -> tuple[dict[str, Any], TrackedRun]:
    """One run to its end while its folder is `locked`. Returns its document and what MLflow holds of it.

    With `sidecars`, a folder of trained ones, nothing is trained: those are evaluated under `config`. `parent_run_id`
    is the MLflow run that this one is a part of. Another `job` says how many steps it has in `total`, and what is left
    of it with `publish`.
    """
    job = job or ("train" if sidecars is None else "evaluate")
    record, resumed = open_run(config)
    doing, newest = "Resuming" if resumed else "Starting", record.newest_checkpoint()
    since = f", from step {step_of(newest)}" if newest else ""
    console.print(f"{doing} [bold]{config.name}[/] in {config.run_dir}{since}", soft_wrap=True, highlight=False)
    say = None if console.is_terminal else line_printer(console, config.name)
    with (
        EventLog(config.run_dir, config.name, say) as events,
        Progress(console, total=total or config.training.steps, run=config.name, events=events) as progress,
    ):
        progress.phase("opening MLflow")
        with tracking.start(config, run_id=record.mlflow_run_id, parent_run_id=parent_run_id) as tracked:
            record = record.update(mlflow_run_id=tracked.run_id, state="KILLED")  # true until it is done
            begin(events, tracked, record, resumed)
            progress.phase("starting the cluster")

            def interrupted() -> None:
                tracked.interrupted()
                progress.catch_up()
                events.interrupted()

            with cluster.connect(config.cluster), progress.listening() as heard:
                events.write("cluster ready", workers=config.cluster.num_workers, nodes=cluster.num_nodes())
                callbacks = [tracked.callback(), heard, EventCallback(heard.post, tracked.unsent)]
                finished = launch(job, config, record, callbacks, sidecars, interrupted)
            progress.phase("writing the report")
            with room_for("the results of the run", config.run_dir):
                put = publish or publish_evaluation
                document = put(config, finished, sidecars or finished / SIDECARS_FOLDER, tracked)
                record.publish_config()
        record.update(state="FINISHED")
    return document, tracked


def begin(events: EventLog, tracked: TrackedRun, record: Run, resumed: bool) -> None:
    """The first event of a run, or of its next part."""
    newest = record.newest_checkpoint() if resumed else None
    step = step_of(newest) if newest else None
    events.begin(tracked.run_id, tracked.problems, attempt=record.attempt, resumed=resumed, step=step)


def publish_evaluation(config: RunConfig, finished: Path, sidecars: Path, tracked: TrackedRun) -> dict[str, Any]:
    """Copy the sidecars, and the evaluation in `finished`, into the run's folder; draw it, file it under the MLflow
    run."""
    folder = config.run_dir
    replace_folder(sidecars, folder / SIDECARS_FOLDER)
    document = complete(config, json.loads((finished / EVALUATION).read_text()))
    written = write_report(document, folder, tracked.history())
    tracked.log_metrics(headline(document), step=config.training.steps)
    tracked.log_table(document["rows"], "evaluation_rows.json")
    tracked.log_artifacts([*written.values(), folder / SIDECARS_FOLDER])
    if (finished / LIFE).is_file():  # not of one that was only evaluated
        publish_life(config, finished, tracked)
    return document


def publish_life(config: RunConfig, finished: Path, tracked: TrackedRun) -> dict[str, Any]:
    """What a life has left: a picture and numbers in the run's folder, with the memories to dream of; and in MLflow."""
    from pipelines.dream_report import write_dreamed  # imports torch

    folder = config.run_dir
    shutil.copy(finished / MEMORIES, folder / MEMORIES)
    document = complete(config, json.loads((finished / LIFE).read_text()))
    written = [*sleep_report.write(document, folder), *write_dreamed(config, finished, folder)]
    tracked.log_metrics(sleep_report.headline(document), step=config.training.steps)
    tracked.log_table(document["rows"], "sleep_rows.json")
    tracked.log_artifacts(written)
    return document


def complete(config: RunConfig, document: dict[str, Any]) -> dict[str, Any]:
    """The evaluation document with what only the driver knows."""
    return document | {
        "schema": 1,
        "run": config.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": config.model_dump(mode="json"),
        "versions": {name: _version(name) for name in REPORTED_VERSIONS},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # a submitted job may carry the sources along instead
        return None


def headline(document: dict[str, Any]) -> dict[str, float]:
    """The numbers by which two runs are compared in MLflow."""
    numbers = {
        f"recall/{row['task']}/{row['filler']}/gap_{row['gap_tokens']:07d}/memory_{row['memory']}": row["accuracy"]
        for row in document["rows"]
    }
    drift = document.get("drift", {})
    numbers |= {f"drift/{name}": value for name, value in drift.items() if isinstance(value, float)}
    numbers["memory/state_bytes"] = float(document["state_bytes"])
    return numbers


def replace_folder(source: Path, target: Path) -> None:
    """`target` becomes a copy of `source`, whole or not at all."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
