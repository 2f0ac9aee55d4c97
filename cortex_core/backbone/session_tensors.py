"""The parts of a session as named tensors, and back: what its file holds. Checks: `session_files`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cortex_core.backbone.passes import States
from cortex_core.backbone.segments import Rows, Tags
from cortex_core.backbone.write_log import WriteLog
from cortex_core.fast_weights.quantised import from_int8, to_int8
from cortex_core.fast_weights.state import FastWeights

SCALE = ".scale"
"""What the name of a row's scales ends with."""


def state_tensors(prefix: str, states: Mapping[int, FastWeights], dtype: str) -> dict[str, Tensor]:
    """`<prefix>.<layer>.up`, `.down` and `.context`; as int8, each with its `.scale`."""
    tensors = {
        f"{prefix}.{layer}.{name}": part
        for layer, state in states.items()
        for name, part in state._asdict().items()
        if part is not None
    }
    if dtype == "float32":
        return tensors
    quantised = {name: to_int8(part) for name, part in tensors.items()}
    scales = {name + SCALE: scale for name, (_, scale) in quantised.items()}
    return {name: integers for name, (integers, _) in quantised.items()} | scales


def states_of(prefix: str, tensors: Mapping[str, Tensor], like: States) -> States:
    """The inverse, float32, for the layers and parts of `like`."""

    def part(name: str) -> Tensor:
        scale = tensors.get(name + SCALE)
        return tensors[name] if scale is None else from_int8(tensors[name], scale)

    def state(layer: int, like: FastWeights) -> FastWeights:
        names = [name for name, value in like._asdict().items() if value is not None]
        return FastWeights(**{name: part(f"{prefix}.{layer}.{name}") for name in names})

    return {layer: state(layer, s) for layer, s in like.items()}


def row_tensors(prefix: str, rows: Rows) -> dict[str, Tensor]:
    """Tokens, rewards, lengths and, if there are any, tags."""
    tensors = {f"{prefix}.{name}": getattr(rows, name) for name in ("input_ids", "reward", "lengths")}
    tags = {} if rows.tags is None else rows.tags._asdict()
    return tensors | {f"{prefix}.{name}": value for name, value in tags.items()}


def rows_of(prefix: str, tensors: Mapping[str, Tensor]) -> Rows:
    """The inverse."""
    tags = None
    if f"{prefix}.{Tags._fields[0]}" in tensors:
        tags = Tags(*(tensors[f"{prefix}.{name}"] for name in Tags._fields))
    ids, reward, lengths = (tensors[f"{prefix}.{name}"] for name in ("input_ids", "reward", "lengths"))
    return Rows(ids, reward, lengths, tags)


def log_tensors(log: WriteLog, dtype: str) -> dict[str, Tensor]:
    """All of a log but its capacity and labels. Writes stay float32, whatever the base is kept as."""
    tensors = state_tensors("base", {layer: entries.base for layer, entries in log.layers.items()}, dtype)
    for layer, entries in log.layers.items():
        tensors |= {f"log.{layer}.{name}": part for name, part in entries.tensors().items()}
    return tensors | {"folded": log.folded}
