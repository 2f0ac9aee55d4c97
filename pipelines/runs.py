"""A run's folder: its configuration, its state, and what it leaves behind. One run, one folder, `out_dir/name`."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from cortex_core.errors import ConfigError, DataError
from cortex_core.training import checkpoint
from pipelines.config import CONFIG_FILE, SIDECARS_FOLDER, RunConfig, load_config
from pipelines.toml_text import dump_toml

STATE_FILE, LOCK_FILE = "run.json", ".lock"
LAST, BEFORE_LAST = "last", "before-last"
"""Folders of the last two checkpoints of a run without Ray, in the attempt's folder."""
RAY_RECORD = "checkpoint_manager_snapshot.json"
State = Literal["RUNNING", "FINISHED", "KILLED"]
FREE = frozenset({"cluster", "sharding", "tracking", "evaluation", "out_dir"})
"""Sections that may change between the parts of one run: they do not decide what is learned. Except where it is kept:
`cluster.storage_path`."""


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

    @property
    def config_file(self) -> Path:
        """The attempt's configuration. That of what the folder publishes is `CONFIG_FILE` in the folder itself."""
        return self.checkpoints / f"{self.storage_name}.toml"

    def newest_checkpoint(self) -> Path | None:
        """The attempt's last whole checkpoint on this machine, whoever wrote it: Ray's workers or this process.

        Of Ray's only those that its controller has on record: what it has not seen is not in MLflow either.
        """
        return self._newest()[0]

    def damaged_checkpoints(self) -> int:
        """How many later ones than `newest_checkpoint` are not whole."""
        return self._newest()[1]

    def _newest(self) -> tuple[Path | None, int]:
        storage = self.checkpoints / self.storage_name
        rays = []
        with suppress(OSError, ValueError, KeyError, TypeError):
            on_record = json.loads((storage / RAY_RECORD).read_text())["checkpoint_results"]
            rays = [storage / each["checkpoint_dir_name"] for each in reversed(on_record)]
        found = [checkpoint.first_whole(row) for row in ([storage / LAST, storage / BEFORE_LAST], rays)]
        newest = checkpoint.newest(folder for folder, _ in found if folder is not None)
        return newest, sum(damaged for folder, damaged in found if folder == newest)

    def publish_config(self) -> None:
        """What the folder holds was made with this attempt's configuration."""
        shutil.copy(self.config_file, self.folder / CONFIG_FILE)

    def update(self, **changes: object) -> Run:
        """Record a change of state on disk."""
        changed = replace(self, **changes)
        fields = {name: value for name, value in asdict(changed).items() if name != "folder"}
        partial = self.folder / (STATE_FILE + ".partial")
        partial.write_text(json.dumps(fields, indent=2) + "\n")
        partial.replace(self.folder / STATE_FILE)
        return changed


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder is this process's alone. Raises ConfigError if another one holds it; its end releases it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{folder}: another process is working on this run; wait for it, or choose another name="
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


def open_run(config: RunConfig) -> tuple[Run, bool]:
    """The run to work on, and whether it goes on from an earlier part. Call it while the folder is `locked`.

    A run that was interrupted is resumed; one that is finished is done again from the start, and what it left stays
    until the end. With other settings an unfinished run is done again only if it has no checkpoint yet that would be
    lost; otherwise ConfigError is raised.
    """
    folder = config.run_dir
    before = read_run(folder)
    resumed = before is not None and before.state != "FINISHED"
    if before is not None and resumed:
        resumed = not _differences(before, config)
    if before is not None and not resumed:
        shutil.rmtree(before.checkpoints, ignore_errors=True)
    attempt = 0 if before is None else before.attempt + (not resumed)
    run = Run(folder, attempt, "RUNNING", before.mlflow_run_id if before is not None and resumed else None)
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    run.config_file.write_text(dump_toml(config))
    if not (folder / SIDECARS_FOLDER).exists():
        run.publish_config()
    return run.update(), resumed


def finished_run(config: RunConfig) -> Run | None:
    """The run whose result the folder holds, if it had these settings: all that decide what is learned or asked."""
    record = read_run(config.run_dir)
    if record is None or record.state != "FINISHED" or not (config.run_dir / CONFIG_FILE).is_file():
        return None
    then, now = (
        each.model_dump(exclude=set(FREE - {"evaluation"}))
        for each in (load_config(config.run_dir / CONFIG_FILE), config)
    )
    return record if then == now else None


def take_over(config: RunConfig, other: Path, attempt: int) -> None:
    """The run that `config` names goes on from the newest checkpoint of the one in folder `other`, under `config`.

    That is its next `attempt`, and in MLflow still the same run. If it has that many by now, nothing is done. Call it
    while nobody works on either; both must have begun, and the other have a checkpoint.
    """
    before, source = read_run(config.run_dir), read_run(other)
    assert before is not None and source is not None
    if before.attempt >= attempt:
        return
    run, newest = Run(config.run_dir, attempt, "KILLED", before.mlflow_run_id), source.newest_checkpoint()
    assert newest is not None
    storage = run.checkpoints / run.storage_name
    shutil.rmtree(storage, ignore_errors=True)
    shutil.copytree(newest, storage / LAST)
    run.config_file.write_text(dump_toml(config))
    run.update()  # from here on it is so
    shutil.rmtree(before.checkpoints / before.storage_name, ignore_errors=True)


def read_run(folder: Path) -> Run | None:
    """What a run's folder says of its last attempt; None if it holds no run. Raises DataError."""
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


def _differences(before: Run, now: RunConfig) -> list[str]:
    """Settings that decide what is learned and differ. Raises ConfigError if there are any and something would be lost.

    Shared storage is Ray's: what lies there is known only once it runs.
    """
    then = load_config(before.config_file)
    old, new = then.model_dump(), now.model_dump()
    old["cluster"], new["cluster"] = ({"storage_path": c.cluster.storage_path} for c in (then, now))
    differing: list[str] = []
    for section in old.keys() - (FREE - {"cluster"}):
        if isinstance(old[section], dict):
            differing += [f"{section}.{key}" for key, value in old[section].items() if value != new[section][key]]
        elif old[section] != new[section]:
            differing.append(section)
    if differing and (then.cluster.storage_path is not None or before.newest_checkpoint() is not None):
        raise ConfigError(
            f"{', '.join(differing)} differs from the unfinished run in {before.folder}: resume it with its own "
            "settings, choose another name=, or remove the folder"
        )
    return differing
