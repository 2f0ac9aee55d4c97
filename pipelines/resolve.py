"""Settings from a recipe and dotted overrides, for any class of settings; one line for each that is wrong."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from cortex_core.config import Settings
from cortex_core.errors import ConfigError, DataError
from pipelines.explain import explain, nearest, parse_text

Overrides = Sequence[str] | Mapping[str, object]
S = TypeVar("S", bound=Settings)

RECIPES = Path(__file__).parent / "recipes"
"""What ships: a name that begins with `pretrain` is for `cortex pretrain`, any other for `cortex train`."""


def resolve(model: type[S], recipe: str | Path | None = None, overrides: Overrides = ()) -> S:
    """Resolve defaults, recipe and overrides to settings of the kind `model`.

    Args:
        model: the class of settings.
        recipe: path of a TOML file, the bare name of one that ships (`demo`), or None for the defaults.
        overrides: `["fast_weights.rank=8", ...]` as typed, or `{"fast_weights.rank": 8, ...}` as values.
            Typed values are TOML literals; text needs no quotes, lists no brackets, and `null` unsets.

    Raises:
        ConfigError: one line per wrong setting.
        DataError: the recipe cannot be read.
    """
    data = {} if recipe is None else _read_toml(find_recipe(recipe))
    for name, value in _pairs(model, overrides):
        _assign(data, name, value)
    try:
        # Strict, so that "8" and true are no integers; as JSON, where a list may still stand for a tuple.
        return model.model_validate_json(json.dumps(data, default=_plain), strict=True)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(model, error.errors(include_url=False), data))) from None


def find_recipe(recipe: str | Path, command: Literal["train", "pretrain"] = "train") -> Path:
    """The file that `recipe` means: a path, or the bare name of a recipe that ships for this command."""
    path = Path(recipe)
    if path.is_file():
        return path
    shipped = {p.stem: "pretrain" if p.stem.startswith("pretrain") else "train" for p in RECIPES.glob("*.toml")}
    owner = shipped.get(str(recipe))
    if owner == command:
        return RECIPES / f"{recipe}.toml"
    if owner is not None:
        raise DataError(f"{recipe}: is a recipe of cortex {owner}, not of cortex {command}. See cortex {owner} --help")
    names = sorted(name for name, owner in shipped.items() if owner == command)
    what = "is a folder, not a recipe" if path.is_dir() else "no such recipe"
    hint = nearest(path.stem, names)
    raise DataError(
        f"{recipe}: {what}. Give the path of a TOML file or the name of one that ships: {', '.join(names)}"
        + (f". Did you mean {hint}?" if hint else "")
    )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        hint = "Text needs quotes, lists need brackets"
        raise ConfigError(f"{path}: not valid TOML: {error}. {hint}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not text in UTF-8 (byte {error.start}). A recipe is a TOML file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _pairs(model: type[Settings], overrides: Overrides) -> Iterable[tuple[str, object]]:
    if isinstance(overrides, Mapping):
        yield from overrides.items()
        return
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            steps = "training.steps" if "training" in model.model_fields else "steps"
            raise ConfigError(f"{text!r} is not an override: write name=value, such as {steps}=100")
        yield name.strip(), parse_text(model, name.strip(), value.strip())


def _assign(data: dict[str, Any], name: str, value: object) -> None:
    """Set the dotted `name` in nested tables; a mapping is merged into its section, key by key."""
    *sections, key = name.split(".")
    table = data
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{name}: {section} is a value, not a section; it has no keys")
    if isinstance(value, Mapping):
        for inner, item in value.items():
            _assign(data, f"{name}.{inner}", item)
    else:
        table[key] = value


def _plain(value: object) -> object:
    """JSON for what a recipe or a Tune sample may hold: numpy scalars as numbers, paths and dates as text."""
    item = getattr(value, "item", None)
    return item() if callable(item) else str(value)
