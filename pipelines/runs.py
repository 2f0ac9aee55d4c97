"""A run's folder: its configuration, its state, and what it leaves behind. One run, one folder, `out_dir/name`."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from cortex_core.errors import ConfigError, DataError
from pipelines.config import CONFIG_FILE, RunConfig, dump_toml, load_config

STATE_FILE = "run.json"
State = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
FREE = frozenset({"cluster", "sharding", "tracking", "evaluation", "out_dir"})
"""Sections that may change between the parts of one run: they do not decide what is learned."""


@dataclass(frozen=True)
class Run:
    """One attempt at a configuration; a run that was interrupted goes on under the same attempt."""

    folder: Path
    attempt: int
    state: State
    mlflow_run_id: str | None = None

    @property
    def storage_name(self) -> str:
        """Name of the attempt's folder for Ray Train's checkpoints: the same name resumes."""
        return f"attempt-{self.attempt:03d}"

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints of this machine's runs are kept."""
        return self.folder / "checkpoints"

    def update(self, **changes: object) -> Run:
        """Record a change of state on disk."""
        changed = replace(self, **changes)
        fields = {name: value for name, value in asdict(changed).items() if name != "folder"}
        partial = self.folder / (STATE_FILE + ".partial")
        partial.write_text(json.dumps(fields, indent=2) + "\n")
        partial.replace(self.folder / STATE_FILE)
        return changed


def open_run(config: RunConfig) -> tuple[Run, bool]:
    """The run to work on, and whether it goes on from an earlier part.

    A run that was interrupted or failed is resumed; one that is finished is done again from the start, its files
    replaced at the end. Raises ConfigError if an unfinished run of this name has other settings.
    """
    folder = config.run_dir
    before = _read(folder)
    resumed = before is not None and before.state != "FINISHED"
    if resumed:
        _check_same(load_config(folder / CONFIG_FILE), config, folder)
    elif before is not None:
        shutil.rmtree(before.checkpoints, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(dump_toml(config))
    attempt = 0 if before is None else before.attempt + (not resumed)
    run = Run(folder, attempt, "RUNNING", before.mlflow_run_id if before is not None and resumed else None)
    return run.update(), resumed


def _read(folder: Path) -> Run | None:
    file = folder / STATE_FILE
    if not file.is_file():
        return None
    try:
        run = Run(folder, **json.loads(file.read_text()))
        if run.state not in get_args(State) or not isinstance(run.attempt, int):
            raise TypeError(f"attempt {run.attempt!r}, state {run.state!r}")
        return run
    except (json.JSONDecodeError, TypeError) as error:
        raise DataError(f"{file}: is damaged ({error}); remove {folder}, or choose another name=") from error


def _check_same(before: RunConfig, now: RunConfig, folder: Path) -> None:
    old, new = before.model_dump(), now.model_dump()
    for section in old.keys() - FREE:
        if old[section] != new[section]:
            names = (
                [f"{section}.{key}" for key in old[section] if old[section][key] != new[section][key]]
                if isinstance(old[section], dict)
                else [section]
            )
            raise ConfigError(
                f"{', '.join(names)} differs from the unfinished run in {folder}: resume it with its own settings, "
                f"choose another name=, or remove the folder"
            )
