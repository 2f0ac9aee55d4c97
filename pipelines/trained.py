"""What a run that has trained a memory was run with, for commands that go on from it."""

from __future__ import annotations

import shlex
from pathlib import Path

from cortex_core.errors import DataError
from pipelines.config import CONFIG_FILE, SIDECARS_FOLDER, RunConfig, load_config
from pipelines.preflight import check_against_backbone, check_against_machine, check_data, check_deepspeed


def settings_of(folder: Path, overrides: list[str]) -> RunConfig:
    """The settings of a run whose training has finished, with overrides. Raises DataError, ConfigError."""
    if not (folder / CONFIG_FILE).is_file():
        state = f"has no {CONFIG_FILE}" if folder.is_dir() else "no such folder"
        raise DataError(f"{folder}: {state}, so it is no run. Give the folder that cortex train wrote: out_dir/name")
    config = load_config(folder / CONFIG_FILE, overrides)
    if not (folder / SIDECARS_FOLDER).is_dir():
        raise DataError(
            f"{folder}: has no {SIDECARS_FOLDER} yet, so its training has not finished. "
            f"Go on with it: cortex train {shlex.quote(str(folder / CONFIG_FILE))}"
        )
    check_against_machine(config)
    check_deepspeed(config)
    check_data(config)
    check_against_backbone(config)
    return config
