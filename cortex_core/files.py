"""One safetensors file with its notes as JSON in the header: whole or not there.

It is written beside the old one, forced to disk and then renamed over it. Whatever stops the process, the path holds
the old file or the new one; nothing ever runs when a file is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cortex_core.errors import DataError


def write(path: Path, schema: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
    """Replace `path` by these tensors and notes. A `.partial` file that an earlier crash left is written over."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    content = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    save_file(content, partial, metadata={"schema": schema, "notes": json.dumps(notes)})
    _to_disk(partial)
    partial.replace(path)
    _to_disk(path.parent)  # the new name itself


def read(path: Path, schema: str, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and notes, as they were written. Raises DataError: missing, truncated, of another schema."""
    if not path.is_file():
        raise DataError(f"{what} {path}: there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{what} {path}: not a whole safetensors file ({error})") from error
    if metadata.get("schema") != schema:
        raise DataError(f"{what} {path}: schema is {metadata.get('schema')!r}, this version reads {schema!r}")
    try:
        notes = json.loads(metadata["notes"])
    except (KeyError, json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{what} {path}: its notes are unreadable; it is damaged") from error
    if not isinstance(notes, dict):
        raise DataError(f"{what} {path}: its notes are {type(notes).__name__}, not a table; it is damaged")
    return tensors, notes


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
