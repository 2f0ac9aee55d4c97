"""A training checkpoint: sidecars, optimizer, weight average, random state and the data cursor. Safetensors and JSON.

It does not know how many workers wrote it: data and gradients depend on the step alone, so any number can go on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from cortex_core.errors import DataError

if TYPE_CHECKING:  # whoever looks for checkpoints need not wait for transformers
    from cortex_core.training.loop import Learner

SCHEMA = "cortex-checkpoint/2"
TENSORS, COUNTERS = "training.safetensors", "training.json"


def save(folder: Path, learner: Learner, beside: Sequence[str] = ()) -> None:
    """Write the learner's state into an existing folder, the counters last: a folder without them is not whole, nor one
    without the files `beside` it."""
    tensors, counters = learner.state()
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    tensors["random_state"] = torch.get_rng_state()
    save_file(tensors, folder / TENSORS)
    files = {"files": [TENSORS, *beside]} if beside else {}
    (folder / COUNTERS).write_text(json.dumps({"schema": SCHEMA, **counters, **files}))


def step_of(folder: Path) -> int | None:
    """Steps done when it was saved; None for a folder that holds no whole checkpoint.

    Counters may say which `files` they stand for, if not the one of a learner.
    """
    try:
        counters = json.loads((folder / COUNTERS).read_text())
        for name in counters.get("files", [TENSORS]):
            with safe_open(folder / name, framework="pt"):  # checks that the file is as long as its header says
                pass
        return int(counters["step"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def newest(folders: Iterable[Path]) -> Path | None:
    """Of some checkpoints, the whole one with the most steps."""
    found = [(step, folder) for folder in folders if (step := step_of(folder)) is not None]
    return max(found)[1] if found else None


def first_whole(folders: Iterable[Path]) -> tuple[Path | None, int]:
    """The first whole checkpoint of a row, the newest first, and how many that are not whole come before it."""
    damaged = 0
    for folder in folders:
        if step_of(folder) is not None:
            return folder, damaged
        damaged += folder.is_dir()
    return None, damaged


def load(folder: Path, learner: Learner) -> None:
    """Continue from `save`. Raises DataError for a checkpoint that is not whole or of another configuration."""
    try:
        saved = json.loads((folder / COUNTERS).read_text())
        tensors = load_file(folder / TENSORS)
        schema, random_state = saved.get("schema"), tensors.pop("random_state")
        counters = {name: int(saved[name]) for name in ("step", "nonfinite_steps")} if schema == SCHEMA else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise DataError(f"checkpoint {folder}: not whole ({type(error).__name__}: {error})") from error
    if schema != SCHEMA:
        raise DataError(f"checkpoint {folder}: schema is {schema!r}, this version reads {SCHEMA!r}")
    kinds = ("weights", "average")
    expected = {f"{kind}.{name}": p.shape for kind in kinds for name, p in learner.parameters.items()}
    found = {name: value.shape for name, value in tensors.items() if name.startswith(kinds)}
    if expected != found:
        raise DataError(
            f"checkpoint {folder}: is of another memory (fast_weights or backbone differ); use another run name"
        )
    torch.set_rng_state(random_state)
    learner.restore(tensors, counters)
