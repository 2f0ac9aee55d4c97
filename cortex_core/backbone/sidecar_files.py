"""Trained sidecars on disk: `sidecars.safetensors` and `cortex.json`. A few megabytes, no code, no pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cortex_core.config import FastWeightsConfig
from cortex_core.errors import DataError, IncompatibleError

SCHEMA = "cortex-sidecars/2"
WEIGHTS, SETTINGS = "sidecars.safetensors", "cortex.json"


class SavedSidecars(NamedTuple):
    """What a folder of trained sidecars holds."""

    folder: Path
    weights: dict[str, Tensor]
    fast_weights: FastWeightsConfig
    segment_tokens: int
    backbone: str
    """Fingerprint of the backbone that they were trained on."""


def write(
    folder: Path, weights: dict[str, Tensor], fast_weights: FastWeightsConfig, segment_tokens: int, backbone: str
) -> None:
    """Write a folder; files that exist are replaced only once the new ones are whole."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "schema": SCHEMA,
        "backbone_fingerprint": backbone,
        "segment_tokens": segment_tokens,
        "fast_weights": fast_weights.model_dump(mode="json"),
    }
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in _compact(weights).items()}
    save_file(tensors, folder / (WEIGHTS + ".partial"))
    (folder / (SETTINGS + ".partial")).write_text(json.dumps(settings, indent=2) + "\n")
    for name in (WEIGHTS, SETTINGS):
        (folder / (name + ".partial")).replace(folder / name)


def read(folder: Path) -> SavedSidecars:
    """Read a folder. Raises DataError if it is missing, truncated or of another schema."""
    for name in (SETTINGS, WEIGHTS):
        if not (folder / name).is_file():
            raise DataError(
                f"sidecars {folder}: {name} is missing; give a folder written by save_pretrained or a training run"
            )
    try:
        settings = json.loads((folder / SETTINGS).read_text())
        if settings["schema"] != SCHEMA:
            raise DataError(f"sidecars {folder}: schema is {settings['schema']!r}, this version reads {SCHEMA!r}")
        config = FastWeightsConfig.model_validate(settings["fast_weights"])
        weights = _with_fit(_expanded(load_file(folder / WEIGHTS)))
        return SavedSidecars(
            folder, weights, config, int(settings["segment_tokens"]), str(settings["backbone_fingerprint"])
        )
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError, ValidationError, SafetensorError) as error:
        raise DataError(
            f"sidecars {folder}: not readable ({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error


def restore(sidecars: nn.Module, saved: SavedSidecars, backbone: str) -> None:
    """Copy saved weights into sidecars of the same configuration. Raises IncompatibleError, DataError."""
    if backbone != saved.backbone:
        raise IncompatibleError(
            f"sidecars {saved.folder}: were trained on another backbone ({saved.backbone}, this one is {backbone}); "
            "load the backbone that the training run names, in its dtype (float16 has a fingerprint of its own)"
        )
    expected = {name: tuple(value.shape) for name, value in sidecars.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in saved.weights.items()}
    if expected != found:
        differing = sorted(set(expected.items()) ^ set(found.items()))[0][0]
        raise DataError(f"sidecars {saved.folder}: {WEIGHTS} does not fit {SETTINGS} (first difference: {differing})")
    sidecars.load_state_dict(saved.weights)


_BY_DIMENSION = ("content", "key_taps", "query_taps", "relation", "key_binding", "query_binding")
"""Parts of the addresses with a column for each dimension of the key space; the last three only with binding."""


def _compact(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the columns of dimensions that were pruned."""
    smaller = dict(weights)
    for name, live in weights.items():
        if name.endswith(".live"):
            for part in _BY_DIMENSION:
                other = name.removesuffix("live") + part
                if other in weights:
                    smaller[other] = weights[other][:, live.flatten() > 0]
    return smaller


def _expanded(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """With zeros there again. A tensor that does not fit its mask is left as it is, and refused later."""
    larger = dict(weights)
    for name, live in weights.items():
        if name.endswith(".live"):
            columns = live.flatten() > 0
            for part in _BY_DIMENSION:
                found = weights.get(other := name.removesuffix("live") + part)
                if found is not None and found.shape[1:] == (int(columns.sum()),):
                    larger[other] = found.new_zeros(len(found), len(columns))
                    larger[other][:, columns] = found
    return larger


def _with_fit(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Slow weights of the time before their addresses were fitted look for things where they always did."""
    larger = dict(weights)
    for name, prototypes in weights.items():
        if name.endswith(".slow.prototypes") and prototypes.dim() == 2:
            place, size = name.removesuffix("prototypes"), prototypes.shape[1]
            larger.setdefault(place + "centre", torch.zeros(size))
            larger.setdefault(place + "spread", torch.eye(size))
    return larger
