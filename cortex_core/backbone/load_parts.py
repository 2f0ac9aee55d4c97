"""Reads a checkpoint part by part while transformers fills the shards of a model.

On its own, transformers has rank 0 read all files into memory before it hands out the first weight.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from transformers import modeling_utils


@contextmanager
def part_by_part() -> Iterator[None]:
    """Within it, `from_pretrained` under an active `HfDeepSpeedConfig` holds one part of the checkpoint at a time: a
    decoder layer, or a tensor that belongs to none. Only rank 0 reads values, as without it. Safetensors only."""
    read, fill = modeling_utils.load_state_dict, modeling_utils._load_state_dict_into_zero3_model
    files: dict[str, str] = {}

    def shapes(checkpoint_file: str | os.PathLike[str], *_: Any, **__: Any) -> dict[str, Tensor]:
        found = read(checkpoint_file, map_location="meta")
        files.update(dict.fromkeys(found, os.fspath(checkpoint_file)))
        return found

    def fill_by_part(
        model: Any, state_dict: Mapping[str, Tensor], load_config: Any = None
    ) -> tuple[list[str], set[str]]:
        errors, missing = list[str](), {*model.state_dict()}
        for names in parts(state_dict):
            part = {name: state_dict[name] for name in names}
            said, left = fill(model, _values(names, files) if dist.get_rank() == 0 else part, load_config)
            errors, missing = errors + said, missing & left
            _give_back_freed_memory()
        return errors, missing

    modeling_utils.load_state_dict, modeling_utils._load_state_dict_into_zero3_model = shapes, fill_by_part
    try:
        yield
    finally:
        modeling_utils.load_state_dict, modeling_utils._load_state_dict_into_zero3_model = read, fill


def _give_back_freed_memory() -> None:
    """glibc keeps what tensors have freed: part after part, as much as the whole model."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def parts(names: Iterable[str]) -> list[list[str]]:
    """Names of tensors that are read together: what has one number first, such as `model.layers.7`, is one layer's. In
    there, experts that have a tensor each in the file may become one in the model."""
    found: dict[str, list[str]] = {}
    for name in names:
        pieces = name.split(".")
        number = next((at for at, piece in enumerate(pieces) if piece.isdecimal()), len(pieces))
        found.setdefault(".".join(pieces[: number + 1]), []).append(name)
    return list(found.values())


def _values(names: Iterable[str], files: Mapping[str, str]) -> dict[str, Tensor]:
    by_file: dict[str, list[str]] = {}
    for name in names:
        by_file.setdefault(files[name], []).append(name)
    values: dict[str, Tensor] = {}
    for file, inside in by_file.items():
        with safe_open(file, framework="pt") as opened:
            values |= {name: opened.get_tensor(name) for name in inside}
    return values
