"""`cortex tune`: a sweep of one study, and the command of a submitted job (`python -m pipelines.tune STUDY …`).

Every trial is an ordinary run in a folder of its name within `out_dir/name/trials`: it has checkpoints, an MLflow run
that is a child of the sweep's, and once it has finished a report. The same command goes on where an earlier one was
stopped or killed: trials that have ended stay, others go on from their last checkpoint.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from cortex_core.errors import ConfigError, DataError
from pipelines import cluster, tracking
from pipelines.actors import Gauges, on_head
from pipelines.config import located
from pipelines.follow import Follower
from pipelines.mailbox import Mailboxes
from pipelines.progress import print_where
from pipelines.runs import locked
from pipelines.search import search
from pipelines.sweep_plan import SweepPlan
from pipelines.sweep_table import best_of, print_sweep, sweep_result, write_sweep
from pipelines.toml_text import dump_toml
from pipelines.tracking import TrackedRun

SWEEP_FILE, BEST_FILE = "sweep_run.json", "best.toml"


def run(plan: SweepPlan) -> int:
    """Run what has not ended yet, compare, write. Returns the exit code: 1 if no trial has finished."""
    plan, console = plan._replace(config=located(plan.config)), Console()
    with locked(plan.config.run_dir):
        return _run(plan, console)


def _run(plan: SweepPlan, console: Console) -> int:
    folder = plan.config.run_dir
    record = _record(plan)
    with tracking.start(tracking.of_many(plan.config, "sweep"), run_id=record.get("mlflow_run_id")) as parent:
        record |= {"mlflow_run_id": parent.run_id}
        (folder / SWEEP_FILE).write_text(json.dumps(record, indent=2) + "\n")
        parent.log_params(_described(plan))
        if record["state"] != "FINISHED":
            _say_what(plan, console)
            with cluster.connect(plan.config.cluster), _children_closed(parent):
                concurrent = _concurrent(plan)
                mailboxes = on_head(Mailboxes, Gauges)
                if not search(plan, parent, mailboxes, concurrent, Follower(plan.config, plan.study.num_trials)):
                    raise KeyboardInterrupt
            (folder / SWEEP_FILE).write_text(json.dumps(record | {"state": "FINISHED"}, indent=2) + "\n")
        result = sweep_result(plan)
        best = best_of(result)
        if best is not None:
            (folder / BEST_FILE).write_text(dump_toml(plan.best(best["sample"])))
            parent.tag_best(best["mlflow_run_id"])
            parent.log_metrics({f"best/{name}": best[name] for name in ("loss_nats", "recall")}, best["step"])
        written = write_sweep(result, folder)
        parent.log_table(result["rows"], "sweep_rows.json")
        parent.log_artifacts(written.values())
    print_sweep(result, console)
    shown = {"Page": "sweep.html", "Picture": "sensitivity.png", "Table": "sweep.csv"}
    places = {what: str(written[name]) for what, name in shown.items()}
    if best is not None:
        places["Best"] = f"cortex train {folder / BEST_FILE}"
    print_where(places, parent, console)
    return 0 if any(row["state"] == "finished" for row in result["rows"]) else 1


def _record(plan: SweepPlan) -> dict[str, Any]:
    """What an earlier part of the sweep has left. Raises ConfigError if that was another sweep."""
    file, identity = plan.config.run_dir / SWEEP_FILE, plan.identity()
    try:
        before = json.loads(file.read_text())
        known = before["identity"]
    except OSError:
        return {"state": "RUNNING", "identity": identity}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: is damaged ({error}); remove {file.parent}, or choose another name=") from None
    if known != identity:
        differing = [name for name in identity if identity[name] != known.get(name)]
        raise ConfigError(
            f"{file.parent}: holds a sweep with another {', '.join(differing)}. Go on with it under its own settings, "
            "choose another name=, or remove the folder"
        )
    return before


def _concurrent(plan: SweepPlan) -> int:
    """Trials that have room side by side; each is as many workers as the run has."""
    wanted = min(plan.concurrent or plan.study.num_trials, plan.study.num_trials)
    room = cluster.room(plan.config.cluster)
    return wanted if room is None else max(1, min(wanted, room // plan.config.cluster.num_workers))


@contextmanager
def _children_closed(parent: TrackedRun) -> Iterator[None]:
    """However the sweep ends, no child stays RUNNING in MLflow: whoever could have closed it may be gone."""
    try:
        yield
    finally:
        parent.close_children()


def _described(plan: SweepPlan) -> dict[str, str]:
    study = plan.study
    ranges = {f"space.{name}": str(of) for name, of in study.space.items()}
    return {"study": study.name, "search": study.search, "num_trials": str(study.num_trials)} | ranges


def _say_what(plan: SweepPlan, console: Console) -> None:
    study = plan.study
    console.print(f"Sweep [bold]{plan.config.name}[/] in {plan.config.run_dir}", soft_wrap=True, highlight=False)
    console.print(f"{study.about}; {study.num_trials} trials of {plan.config.training.steps} steps", highlight=False)


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["tune", *sys.argv[1:]]))
