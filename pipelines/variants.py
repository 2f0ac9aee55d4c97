"""What an ablation will run: its variants by name, each with its whole configuration, or one line that says why not.

Nothing here imports torch or ray, so a wrong name or a collision is answered at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cortex_core.errors import ConfigError
from cortex_core.eval.ablations import REFERENCE, VARIANTS
from pipelines.config import RunConfig, load_config
from pipelines.explain import nearest, show
from pipelines.resolve import find_recipe
from pipelines.trained import require_new_memory


class Plan(NamedTuple):
    """One ablation."""

    config: RunConfig
    """The recipe as it is. Results go to its folder, every variant's run to a folder in there."""
    variants: Mapping[str, RunConfig]
    """By name, in the order in which they are run; of `baseline`, which is not run, the reference's."""


def plan(recipe: str | Path, overrides: Sequence[str] = (), names: str | None = None) -> Plan:
    """Resolve an ablation of a recipe.

    Args:
        recipe: path of a TOML file, or the name of one that ships.
        overrides: `name=value` as typed, for all variants.
        names: variants, separated by commas; None takes all. The reference is always among them.

    Raises:
        ConfigError: one line per problem: an unknown variant, an override that a variant sets as well, a variant that
            takes nothing away or that the recipe does not allow, any wrong setting.
        DataError: the recipe cannot be read.
    """
    chosen = choose(names)
    config = load_config(find_recipe(recipe), overrides)
    require_new_memory(config, "cortex ablate")
    _refuse_collisions(overrides, chosen)
    return Plan(config, {name: _configured(name, config, chosen) for name in chosen})


def choose(names: str | None) -> list[str]:
    """The variants that a list separated by commas means, in the order of `VARIANTS`; None means all."""
    if names is None:
        return list(VARIANTS)
    asked = [name.strip() for name in names.split(",") if name.strip()]
    if not asked:
        raise ConfigError(f"--variants {names!r}: names no variant. There are: {', '.join(VARIANTS)}")
    for name in asked:
        if name not in VARIANTS:
            hint = nearest(name, VARIANTS)
            raise ConfigError(
                f"--variants: {name}: no such variant. There are: {', '.join(VARIANTS)}"
                + (f". Did you mean {hint}?" if hint else "")
            )
    return [name for name in VARIANTS if name in asked or name == REFERENCE]


def _refuse_collisions(overrides: Sequence[str], chosen: Sequence[str]) -> None:
    """Which of two values holds would be a guess. In a recipe it is no question: a variant changes the recipe."""
    for text in overrides:
        key = text.partition("=")[0].strip()
        for name in chosen:
            for other, value in VARIANTS[name].overrides.items():
                if f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}."):
                    raise ConfigError(
                        f"{text.strip()}: variant {name} sets {other} to {show(value)}. Write yours into a recipe, "
                        f"which variants change, or leave this one out: {_without(name, chosen)}"
                    )


def _configured(name: str, config: RunConfig, chosen: Sequence[str]) -> RunConfig:
    """A variant's run: an ordinary one, in a folder of its name within that of the ablation, tracked where it is."""
    variant = VARIANTS[name]
    place = {"name": name, "out_dir": str(Path(config.out_dir) / config.name), "tracking.uri": config.tracking_uri}
    if variant.made_by == "nothing":
        name, place["name"] = REFERENCE, REFERENCE
    try:
        changed = load_config(None, config.model_dump() | dict(variant.overrides) | place)
    except ConfigError as error:
        lines = [
            f"variant {name}: {line}. Or leave it out: {_without(name, chosen)}" for line in str(error).splitlines()
        ]
        raise ConfigError("\n".join(lines)) from None
    if variant.overrides and all(_value(config, key) == _value(changed, key) for key in variant.overrides):
        already = ", ".join(f"{key} = {show(_value(config, key))}" for key in variant.overrides)
        raise ConfigError(
            f"variant {name}: takes nothing away, the recipe has {already}. Leave it out: {_without(name, chosen)}"
        )
    return changed


def _value(config: RunConfig, key: str) -> object:
    section, _, field = key.partition(".")
    return getattr(getattr(config, section), field)


def _without(name: str, chosen: Sequence[str]) -> str:
    return f"--variants {','.join(other for other in chosen if other != name)}"
