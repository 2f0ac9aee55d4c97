"""Settings as TOML: what a run's folder keeps, and what `cortex config` prints."""

from __future__ import annotations

import json

from cortex_core.config import Settings


def dump_toml(config: Settings, only: str | None = None) -> str:
    """The resolved configuration, or one section of it, as TOML, one key per line. `resolve` reads it back to an equal
    value. None is left out: TOML has no null, and every field that may be None has it as default."""
    top, sections = [], []
    for name, value in config.model_dump(include=None if only is None else {only}).items():
        if isinstance(value, dict):
            lines = [f"{key} = {_toml(item)}" for key, item in value.items() if item is not None]
            sections.append("\n".join([f"[{name}]", *lines]))
        elif value is not None:
            top.append(f"{name} = {_toml(value)}")
    return "\n\n".join(["\n".join(top), *sections] if top else sections) + "\n"


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # JSON escapes what TOML wants escaped, except for one control character.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_toml(item) for item in value)}]"
    return repr(value)
