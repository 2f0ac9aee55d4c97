"""Low-rank deltas on disk: one safetensors file, with the table of what they belong to as JSON in its header.

A file may come from anywhere. All of it is checked before any of it is used, and nothing in it is ever run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from cortex_core import files
from cortex_core.backbone.fingerprint import fingerprint
from cortex_core.backbone.low_rank import LowRankDeltas
from cortex_core.config import PositiveInt, Settings
from cortex_core.errors import ConfigError, DataError, IncompatibleError

SCHEMA = "cortex-low-rank/1"


class _Table(Settings):
    """What the header says."""

    backbone: str
    modules: Annotated[tuple[str, ...], Field(min_length=1)]
    rank: PositiveInt
    scale: float


def save_deltas(deltas: LowRankDeltas, path: str | Path, backbone: PreTrainedModel, known: str | None = None) -> None:
    """Write one file for `backbone`; an existing one is replaced only once the new one is whole. `known` is the
    backbone's fingerprint, where it is sharded.

    Raises ConfigError for values that are not finite: nobody could load them.
    """
    if not deltas.is_finite:
        raise ConfigError(f"deltas {path}: hold numbers that are not finite and cannot be saved; train them anew")
    table = _Table(backbone=known or fingerprint(backbone), modules=deltas.names, rank=deltas.rank, scale=deltas.scale)
    files.write(Path(path), SCHEMA, deltas.values(), table.model_dump(mode="json"))


def load_deltas(path: str | Path, backbone: PreTrainedModel, known: str | None = None) -> LowRankDeltas:
    """What was saved for the same backbone, not attached yet; `known` as of `save_deltas`. Raises DataError in one
    line."""
    tensors, table = _read(Path(path))
    if table.backbone != (here := known or fingerprint(backbone)):
        raise DataError(
            f"deltas {path}: were made for another backbone ({table.backbone}, this one is {here}); load the backbone "
            "that they were learned on, in its dtype (float16 has a fingerprint of its own)"
        )
    try:
        deltas = LowRankDeltas(backbone, table.modules, table.rank, table.scale)
    except (ConfigError, IncompatibleError) as error:
        raise DataError(f"deltas {path}: do not fit the backbone ({error})") from error
    expected = {name: (tuple(value.shape), value.dtype) for name, value in deltas.values().items()}
    found = {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}
    if expected != found:
        name, (shape, dtype) = sorted(set(expected.items()) ^ set(found.items()), key=str)[0]
        raise DataError(
            f"deltas {path}: {name} {list(shape)} {str(dtype).removeprefix('torch.')} is "
            f"{'missing' if name not in found else 'not what its table promises'}; the file is damaged"
        )
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise DataError(f"deltas {path}: {name} holds numbers that are not finite; the file is damaged")
    with torch.no_grad():
        for name, value in deltas.values().items():
            value.copy_(tensors[name])
    return deltas


def _read(path: Path) -> tuple[dict[str, Tensor], _Table]:
    tensors, notes = files.read(path, SCHEMA, "deltas")
    try:
        return tensors, _Table.model_validate(notes)
    except ValidationError as error:
        first = error.errors()[0]
        where = " ".join(".".join(map(str, first["loc"])).split()) or "table"
        raise DataError(f"deltas {path}: {where}: {first['msg']}; the file is damaged") from error
