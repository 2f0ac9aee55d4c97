"""`cortex config`: every setting with what it does, or what a recipe and overrides resolve to."""

from __future__ import annotations

import shutil

from cortex_core.errors import ConfigError


def show(section: str | None, recipe: str | None, overrides: list[str]) -> int:
    """Print every setting, or what a recipe resolves to. Returns the exit code; raises ConfigError, DataError."""
    from cortex_core.training.pretrain_config import PretrainConfig
    from pipelines.config import RunConfig
    from pipelines.explain import listing, nearest, sections
    from pipelines.resolve import find_recipe, resolve
    from pipelines.toml_text import dump_toml

    if section and "=" in section:  # the optional SECTION took the first override
        section, overrides = None, [section, *overrides]
    model, command = RunConfig, "train"
    if section == "pretrain":
        section, model, command = None, PretrainConfig, "pretrain"
    names = sections(model)
    if section is not None and section not in names:
        hint = nearest(section, names)
        raise ConfigError(
            f"{section}: no such section. There are: {', '.join(names)}" + (f". Did you mean {hint}?" if hint else "")
        )
    if recipe or overrides:
        file = find_recipe(recipe, command) if recipe else None
        print(dump_toml(resolve(model, file, overrides), section), end="")
    else:
        print(*listing(model, section, help_width()), sep="\n")
    return 0


def help_width() -> int:
    """Columns for text that is read in the terminal."""
    return max(72, min(shutil.get_terminal_size((100, 24)).columns, 120))
