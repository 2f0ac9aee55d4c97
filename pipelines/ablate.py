"""`cortex ablate`: train variants of a memory, evaluate them, and write one table that compares them.

Every variant is an ordinary run in a folder of its name within `out_dir/name`: it is locked, resumes, and has a report
and an MLflow run of its own, a child of one parent. What `cortex_core.eval.ablations` marks as made by `evaluation` is
not trained: the reference's sidecars are asked again under its overrides. A variant whose run has finished under
the same settings is not run again, so the same command goes on wherever it was stopped.
"""

from __future__ import annotations

import filecmp
import json
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from cortex_core.backbone.sidecar_files import WEIGHTS
from cortex_core.eval.ablations import REFERENCE, VARIANTS
from pipelines import cluster, tracking
from pipelines.ablation_table import compare, flat, print_ablations, write_ablations
from pipelines.config import SIDECARS_FOLDER, RunConfig, located
from pipelines.progress import print_problems, print_where
from pipelines.report import load_evaluation
from pipelines.runs import finished_run, locked
from pipelines.tracking import TrackedRun
from pipelines.train import work
from pipelines.variants import Plan

PARENT_FILE = "ablations_run.json"
"""Names the parent run in MLflow, in the ablation's folder."""


def run(plan: Plan) -> int:
    """Run what has not finished yet, compare, write. Returns the exit code."""
    config, console = located(plan.config), Console()
    variants = {name: located(of) for name, of in plan.variants.items()}
    with locked(config.run_dir):
        return _run(config, variants, console)


def _run(config: RunConfig, variants: dict[str, RunConfig], console: Console) -> int:
    folder, documents = config.run_dir, dict[str, dict[str, Any]]()
    waiting = [name for name in variants if not _stands(name, variants)]
    with tracking.start(tracking.of_many(config, "ablations"), run_id=_parent_run(folder)) as parent:
        (folder / PARENT_FILE).write_text(json.dumps({"mlflow_run_id": parent.run_id}) + "\n")
        with cluster.connect(config.cluster) if waiting else nullcontext():
            for number, (name, of) in enumerate(variants.items(), start=1):
                stands = _stands(name, variants)
                console.print(
                    f"variant {number} of {len(variants)}: {name}" + (", done" if stands else ""), highlight=False
                )
                if not stands:
                    _work(name, variants, console, parent)
                documents[name] = load_evaluation(of.run_dir)
        result = compare(documents, list(variants)) | {
            "run": config.name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "config": config.model_dump(mode="json"),
        }
        written = write_ablations(result, folder)
        parent.log_table(flat(result), "ablations_rows.json")
        parent.log_artifacts(written.values())
    print_ablations(result, console)
    shown = {"Page": "ablations.html", "Picture": "ablations.png", "Table": "ablations.csv"}
    print_where({what: written[name] for what, name in shown.items()}, parent, console)
    return 0


def _stands(name: str, variants: dict[str, RunConfig]) -> bool:
    """Whether a variant's result is there; one that was made of the reference's sidecars, of those it has now."""
    of = variants[name]
    if finished_run(of) is None:
        return False
    ours, theirs = (each.run_dir / SIDECARS_FOLDER / WEIGHTS for each in (of, variants[REFERENCE]))
    if VARIANTS[name].made_by == "evaluation":
        return theirs.is_file() and ours.is_file() and filecmp.cmp(ours, theirs, shallow=False)
    return True


def _work(name: str, variants: dict[str, RunConfig], console: Console, parent: TrackedRun) -> None:
    of, reference = variants[name], variants[REFERENCE]
    sidecars = reference.run_dir / SIDECARS_FOLDER if VARIANTS[name].made_by == "evaluation" else None
    with locked(of.run_dir):
        _, tracked = work(of, console, parent_run_id=parent.run_id, sidecars=sidecars)
    print_problems(tracked, console)


def _parent_run(folder: Path) -> str | None:
    """The run that an earlier part of the ablation has opened."""
    try:
        known = json.loads((folder / PARENT_FILE).read_text())["mlflow_run_id"]
    except (OSError, ValueError, KeyError, TypeError):  # it names a row in MLflow, nothing that would be lost
        return None
    return known if isinstance(known, str) else None


if __name__ == "__main__":
    import sys

    from pipelines.cli import main

    sys.exit(main(["ablate", *sys.argv[1:]]))
