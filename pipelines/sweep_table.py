"""The result of a sweep: a row per trial, the best first.

`sweep.json` is the result. `.csv` and `.parquet` hold its rows with the sample's values in columns of their own.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cortex_core.errors import DataError
from cortex_core.eval.metric_names import LOSS, RECALL
from pipelines.drawing import image_bytes, percent
from pipelines.follow import FAILURES_FILE, shown
from pipelines.report import load_evaluation
from pipelines.runs import STATE_FILE
from pipelines.schedule_picture import schedules
from pipelines.sweep_page import page
from pipelines.sweep_pictures import parallel_coordinates, sensitivity
from pipelines.sweep_plan import TRIALS_FOLDER, SweepPlan
from pipelines.sweep_record import RESULTS_FILE, exchanges, recorded, schedule

SCHEMA = 1
FILES = ("sweep.html", "parallel.png", "sensitivity.png", "sweep.csv", "sweep.parquet", "sweep.json")
SCHEDULE_FILE = "schedule.png"
"""One more of population-based training."""
SHOWN_ROWS = 20


def sweep_result(plan: SweepPlan) -> dict[str, Any]:
    """What the sweep's folder holds, as one document.

    Trials that were stopped early have taken fewer steps: across all of them, what was reported at `common_step`
    is comparable, the last step that every trial has reached.
    """
    folder = plan.config.run_dir
    reports: dict[str, list[dict[str, Any]]] = {}
    for report in recorded(folder / RESULTS_FILE):
        reports.setdefault(report["trial"], []).append(report)
    common = min((max(r["step"] for r in of) for of in reports.values()), default=None)
    rows = [_row(folder / TRIALS_FOLDER / name, of, common) for name, of in reports.items()]
    rows += _failed(folder / FAILURES_FILE, set(reports))
    if plan.study.search == "pbt":
        made, all_reports = exchanges(folder), [report for of in reports.values() for report in of]
        rows = [row | {"schedule": schedule(row["trial"], all_reports, made)} for row in rows]
    rows.sort(key=lambda row: (row["state"] != "finished", row["loss_nats"] is None, row["loss_nats"]))
    return {
        "schema": SCHEMA,
        "sweep": plan.config.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "study": plan.study.name,
        "about": plan.study.about,
        "space": {name: {"kind": type(of).__name__} | vars(of) for name, of in plan.study.space.items()},
        "search": plan.study.search,
        "stop_early": plan.stop_early,
        "steps": plan.config.training.steps,
        "common_step": common,
        "validation": plan.config.validation.model_dump(mode="json"),
        "rows": rows,
        "config": plan.config.model_dump(mode="json"),
    }


def _row(folder: Path, reports: Sequence[Mapping[str, Any]], common: int | None) -> dict[str, Any]:
    """One trial that has validated at least once."""
    last, run = reports[-1], _json(folder / STATE_FILE)
    at_common = next((report[LOSS] for report in reports if report["step"] == common), None)
    row = {
        "trial": last["trial"], "state": "stopped early", "step": last["step"], "loss_nats": last[LOSS],
        "recall": last[RECALL], "loss_nats_at_common_step": at_common, "held_out_recall": None, "drift": None,
        "reason": None, "mlflow_run_id": run.get("mlflow_run_id"), "sample": last["sample"],
    }  # fmt: skip
    if run.get("state") != "FINISHED":
        return row
    try:
        evaluation = load_evaluation(folder)
    except DataError as error:
        return row | {"reason": str(error)}
    answered = [each["accuracy"] for each in evaluation["rows"] if each["memory"] == "on"]
    drift = (evaluation.get("drift") or {}).get("ratio")
    return row | {"state": "finished", "held_out_recall": sum(answered) / len(answered), "drift": drift}


def _failed(file: Path, others: set[str]) -> list[dict[str, Any]]:
    """Trials that have failed before they had anything to say, the last reason of each."""
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return []
    empty = dict.fromkeys(
        ("step", "loss_nats", "recall", "loss_nats_at_common_step", "held_out_recall", "drift", "mlflow_run_id")
    )
    found = {line["trial"]: empty | line | {"state": "failed"} for line in lines if line["trial"] not in others}
    return list(found.values())


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def best_of(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """Of the trials that have taken all steps, the one with the least validation loss; None if there is none."""
    return next((row for row in result["rows"] if row["state"] == "finished"), None)


def write_sweep(result: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Write FILES into `folder`, the JSON last; files of an earlier result stand until all are made."""
    names, changes = FILES, None
    with tempfile.TemporaryDirectory(prefix=".sweep-", dir=folder) as scratch:
        made = Path(scratch)
        lines, panels = parallel_coordinates(result), sensitivity(result)
        (made / "parallel.png").write_bytes(image_bytes(lines))
        (made / "sensitivity.png").write_bytes(image_bytes(panels))
        if result["search"] == "pbt":
            names, changes = (SCHEDULE_FILE, *FILES), schedules(result)
            (made / SCHEDULE_FILE).write_bytes(image_bytes(changes))
        (made / "sweep.html").write_text(page(result, lines, panels, changes), encoding="utf-8")
        frame = pd.DataFrame(flat(result))
        frame.to_csv(made / "sweep.csv", index=False)
        frame.to_parquet(made / "sweep.parquet", index=False)
        text = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False)
        (made / "sweep.json").write_text(text + "\n", encoding="utf-8")
        for name in names:
            os.replace(made / name, folder / name)
    return {name: folder / name for name in names}


def flat(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows with the sample's values, the last ones where they changed, under their dotted names."""
    nested = ("sample", "schedule")
    return [
        {name: value for name, value in row.items() if name not in nested} | row["sample"] for row in result["rows"]
    ]


def print_sweep(result: Mapping[str, Any], console: Console) -> None:
    """The best trials, a line each."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in ("trial", *(name.rpartition(".")[2] for name in result["space"])):
        table.add_column(head, no_wrap=True)
    for head in ("step", "loss", "recall", "held out"):
        table.add_column(head, justify="right", no_wrap=True)
    for place, row in enumerate(result["rows"][:SHOWN_ROWS]):
        best = place == 0 and row["state"] == "finished"
        values = [shown(row["sample"].get(name)) for name in result["space"]]
        table.add_row(Text(row["trial"], style="bold" if best else ""), *values, *numbers(row))
    console.print(table)
    left = len(result["rows"]) - SHOWN_ROWS
    if left > 0:
        console.print(f"and {left} more in sweep.csv", highlight=False)
    for row in result["rows"]:
        if row["state"] == "failed":
            console.print(
                f"trial {row['trial']} failed: {row['reason']}", soft_wrap=True, highlight=False, markup=False
            )


def numbers(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Step, validation loss and recall, and recall on held-out words; empty where there is none."""
    if row["step"] is None:
        return "", "", "failed", ""
    held_out = "" if row["held_out_recall"] is None else percent(row["held_out_recall"], 1)
    return str(row["step"]), f"{row['loss_nats']:.3f}", percent(row["recall"], 1), held_out
