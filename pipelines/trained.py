"""What a run that has trained a memory was run with, for commands that go on from it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from cortex_core.config import ASSETS, BUILTIN, FastWeightsConfig
from cortex_core.errors import ConfigError, DataError
from pipelines.config import CONFIG_FILE, SIDECARS_FOLDER, RunConfig, load_config
from pipelines.preflight import check_against_backbone, check_against_machine, check_data, check_deepspeed


def with_its_memory(config: RunConfig) -> RunConfig:
    """A run that begins with `sidecars`, with the memory and the segments that those were trained with, unless it has
    them already. Raises DataError, ConfigError."""
    if config.sidecars is None:
        return config
    name = config.sidecars
    folder = ASSETS / name.removeprefix(BUILTIN) if name.startswith(BUILTIN) else Path(name).expanduser()
    memory, segment = _described(folder, name)
    given = config.fast_weights
    if given not in (FastWeightsConfig(), memory):
        wrong = next(n for n, value in memory.model_dump().items() if given.model_dump()[n] != value)
        raise ConfigError(
            f"fast_weights.{wrong} = {getattr(given, wrong)}: must be {getattr(memory, wrong)}, as sidecars = "
            f"{config.sidecars} were trained with. Leave fast_weights out, or begin with other sidecars"
        )
    if config.backbone.segment_tokens != segment:
        raise ConfigError(
            f"backbone.segment_tokens = {config.backbone.segment_tokens}: must be {segment}, as sidecars = "
            f"{config.sidecars} were trained with"
        )
    return config.model_copy(update={"fast_weights": memory})


def require_new_memory(config: RunConfig, command: str) -> None:
    """For commands that compare memories which they train from the beginning. Raises ConfigError for any other run."""
    if config.stage != "memory":
        raise ConfigError(
            f'stage = "{config.stage}": must be "memory": {command} compares memories that it trains. Give the recipe '
            "of one, such as demo"
        )
    if config.sidecars is not None:
        raise ConfigError(
            f"sidecars = {config.sidecars}: must be null: {command} compares memories that it trains from the "
            "beginning. Leave it out"
        )


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
    memory, _ = _described(folder / SIDECARS_FOLDER, str(folder / SIDECARS_FOLDER))
    if memory.slow_slots:  # they have grown since the run began
        grown = {"slow_slots": memory.slow_slots, "slow_active": memory.slow_active}
        config = config.model_copy(update={"fast_weights": config.fast_weights.model_copy(update=grown)})
    check_against_machine(config)
    check_deepspeed(config)
    check_data(config)
    check_against_backbone(config)
    return config


def _described(folder: Path, name: str) -> tuple[FastWeightsConfig, int]:
    """The memory that sidecars are of, and their segments. Raises DataError."""
    try:
        saved = json.loads((folder / "cortex.json").read_text())
        return FastWeightsConfig.model_validate(saved["fast_weights"]), int(saved["segment_tokens"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"sidecars = {name}: no sidecars can be read there ({str(error).splitlines()[0]}). Give a folder that "
            "cortex train or save_pretrained wrote, such as runs/demo/sidecars"
        ) from error
