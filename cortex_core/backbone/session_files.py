"""Reading session files. A file may come from anywhere: all of it is checked before any of it is used."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cortex_core.backbone.segments import NEVER, NO_SOURCE
from cortex_core.backbone.session import SCHEMA, Session
from cortex_core.backbone.session_tensors import SCALE, log_tensors, row_tensors, rows_of, state_tensors, states_of
from cortex_core.backbone.write_log import LayerLog, WriteLog
from cortex_core.errors import DataError, IncompatibleError

READABLE = (SCHEMA, "cortex-session/2", "cortex-session/1")
"""The second version has no context; the first has neither log nor int8."""
UNIT = 1.0 + 1e-4
"""Longest key, with what rounding may add."""

Expected = dict[str, tuple[tuple[int, ...], torch.dtype]]


def load_session(
    path: str | Path, like: Session, segment_tokens: int, *, vocab_size: int, write_strength: float
) -> Session:
    """Read a saved session that fits `like`, which has a log, in everything but the batch size.

    Raises DataError (missing, truncated, not a session, malformed), IncompatibleError (of another model or sidecar).
    """
    if not Path(path).is_file():
        raise DataError(f"session file {path}: there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise DataError(f"session file {path}: not a whole safetensors file ({error})") from error
    if metadata.get("schema") not in READABLE:
        raise DataError(f"session file {path}: schema is {metadata.get('schema')!r}, this version reads {SCHEMA!r}")
    _check_identity(path, metadata.get("identity", ""), like.identity)
    log = _log_settings(path, metadata.get("log"))
    dtype = metadata.get("dtype", "float32")
    if dtype not in ("float32", "int8"):
        raise DataError(f"session file {path}: dtype is {dtype!r}, this version reads 'float32' and 'int8'")
    expected = _expected(path, tensors, like, dtype, log)
    if metadata["schema"] != SCHEMA:  # its segments knew nothing of what stood before them
        nothing = {name: wanted for name, wanted in expected.items() if ".context" in name}
        tensors |= {
            name: torch.full(shape, name.endswith(SCALE), dtype=kind) for name, (shape, kind) in nothing.items()
        }
    _check_shapes(path, tensors, expected, segment_tokens, log)
    _check_values(path, tensors, vocab_size)
    if log is not None:
        _check_log(path, tensors, like, log, vocab_size, write_strength)
    device = like.start_tokens.device
    tensors = {name: value.to(device) for name, value in tensors.items()}
    before = rows_of("before", tensors) if "before.lengths" in tensors else None
    states = states_of("layer", tensors, like.states)
    opened = rows_of("open", tensors)
    kept = None if log is None else _log(tensors, like, log)
    return Session(states, opened, tensors["start_tokens"], like.identity, like.empty, kept, before)


def _log(tensors: Mapping[str, Tensor], like: Session, settings: dict[str, Any]) -> WriteLog:
    layers = {}
    bases = states_of("base", tensors, {n: state.matrices for n, state in like.states.items()})
    for layer, base in bases.items():
        prefix = f"log.{layer}."
        parts = {name.removeprefix(prefix): part for name, part in tensors.items() if name.startswith(prefix)}
        layers[layer] = LayerLog.from_tensors(base, parts)
    return WriteLog(settings["capacity"], tuple(settings["labels"]), tensors["folded"], layers)


def _check_identity(path: str | Path, found: str, expected: dict[str, str]) -> None:
    try:
        identity = json.loads(found)
    except json.JSONDecodeError as error:
        raise DataError(f"session file {path}: its identity is unreadable; save the session again") from error
    for part, value in expected.items():
        if not isinstance(identity, dict) or identity.get(part) != value:
            got = identity.get(part) if isinstance(identity, dict) else None
            raise IncompatibleError(
                f"session file {path}: was written with another {part} ({got}, this model has {value}); "
                "a memory can only be read by the model that wrote it"
            )


def _log_settings(path: str | Path, found: str | None) -> dict[str, Any] | None:
    """Capacity and labels of the log; None where there is none."""
    if found is None:
        return None
    settings: Any = None
    try:
        settings = json.loads(found)
        capacity, labels = settings["capacity"], settings["labels"]
        good = type(capacity) is int and capacity >= 1 and isinstance(labels, list)
        good = good and all(isinstance(label, str) for label in labels) and len(set(labels)) == len(labels)
    except (json.JSONDecodeError, TypeError, KeyError):
        good = False
    if not good:
        raise DataError(f"session file {path}: the settings of its log are unreadable; start a new session")
    return settings


def _expected(
    path: str | Path, tensors: Mapping[str, Tensor], like: Session, dtype: str, log: dict[str, Any] | None
) -> Expected:
    """Shape and type of every tensor, from the model and the few sizes that are the file's own."""
    if "start_tokens" not in tensors:
        raise DataError(f"session file {path}: start_tokens is missing; it is damaged, start a new session")
    batch = tensors["start_tokens"].shape[0] if tensors["start_tokens"].dim() else 0
    assert like.log is not None
    parts = state_tensors("layer", like.states, dtype) | row_tensors("open", like.open_rows._replace(tags=None))
    if log is not None:
        parts |= row_tensors("open", like.open_rows) | log_tensors(like.log, dtype)
    if "before.lengths" in tensors:
        parts |= row_tensors("before", like.open_rows._replace(tags=None))
    expected: Expected = {name: ((batch, *part.shape[1:]), part.dtype) for name, part in parts.items()}
    for name, (shape, kind) in expected.items():
        # Where the model has no tokens and no writes yet, the file says how many there are: the same for all parts.
        known = name.startswith(("layer", "base")) or len(shape) == 1
        if not known:
            axis = 2 if name.rpartition(".")[2] in ("keys", "values", "write", "ticks") else 1
            size = len(log["labels"]) if log and name == "folded" else _size(tensors, name)
            expected[name] = ((*shape[:axis], size, *shape[axis + 1 :]), kind)
    return expected | {"start_tokens": ((batch,), torch.int64)}


def _size(tensors: Mapping[str, Tensor], name: str) -> int:
    """How many tokens (or writes) the parts of which `name` is one have, as the first of them says."""
    first = name.rpartition(".")[0] + (".positions" if name.startswith("log.") else ".input_ids")
    return tensors[first].shape[-1] if first in tensors and tensors[first].dim() == 2 else 0


def _check_shapes(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    expected: Expected,
    segment_tokens: int,
    log: dict[str, Any] | None,
) -> None:
    for name, (shape, dtype) in expected.items():
        value = tensors.get(name)
        if value is None or tuple(value.shape) != tuple(shape) or value.dtype != dtype:
            got = "missing" if value is None else f"{value.dtype} {list(value.shape)}"
            raise DataError(f"session file {path}: {name} is {got}, expected {dtype} {list(shape)}")
    batch, open_tokens = tensors["open.input_ids"].shape
    if batch == 0 or open_tokens > segment_tokens:
        raise DataError(
            f"session file {path}: {batch} rows of {open_tokens} open tokens; a segment has {segment_tokens}"
        )
    unknown = sorted(set(tensors) - set(expected))
    if unknown:
        raise DataError(f"session file {path}: {unknown[0]} is no part of a session with these settings")
    longest = max((tensors[name].shape[1] for name in tensors if name.endswith(".positions")), default=0)
    if log is not None and longest > log["capacity"]:
        raise DataError(f"session file {path}: {longest} writes in a log of {log['capacity']}; it is damaged")


def _check_values(path: str | Path, tensors: Mapping[str, Tensor], vocab_size: int) -> None:
    rows = [name for name in ("open", "before") if f"{name}.lengths" in tensors]
    problems = {"negative start_tokens": bool((tensors["start_tokens"] < 0).any())}
    for name in rows:
        ids, lengths = tensors[f"{name}.input_ids"], tensors[f"{name}.lengths"]
        problems[f"{name}.input_ids outside the vocabulary"] = bool(((ids < 0) | (ids >= vocab_size)).any())
        segment = "the open segment" if name == "open" else "what stands before it"
        problems[f"{name}.lengths outside {segment}"] = bool(((lengths < 0) | (lengths > ids.shape[1])).any())
    scales = [part for name, part in tensors.items() if name.endswith(SCALE)]
    problems["numbers that are not finite"] = not all(bool(torch.isfinite(t).all()) for t in tensors.values())
    problems["scales that are not positive"] = any(bool((scale <= 0).any()) for scale in scales)
    _refuse(path, problems.items())


def _check_log(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    like: Session,
    log: dict[str, Any],
    vocab_size: int,
    write_strength: float,
) -> None:
    """Writes of known sources, at ascending positions between the base and the open segment, as gates give them."""
    num_labels, closed = len(log["labels"]), tensors["start_tokens"]

    def unknown(sources: Tensor) -> bool:
        return bool(((sources < NO_SOURCE) | (sources >= num_labels)).any())

    problems = {
        "open.source outside the labels": unknown(tensors["open.source"]),
        "open.expires outside the session": bool(
            ((tensors["open.expires"] < 0) | (tensors["open.expires"] > NEVER)).any()
        ),
    }
    for layer in like.states:
        part = {name: tensors[f"log.{layer}.{name}"] for name in (*_LOG_PARTS,)}
        counts, start, places = part["counts"], part["start"], part["positions"]
        real = torch.arange(places.shape[1]) < counts[:, None]
        earlier = torch.cat([start[:, None] - 1, places[:, :-1]], dim=1)
        wrong_place = (places <= earlier) | (places >= closed[:, None])
        over = (part["expires"] <= closed[:, None]) | (part["expires"] > NEVER)
        doses, ids = torch.stack([part["write"], part["ticks"]]), part["token_ids"]
        problems |= {
            f"log.{layer}.counts outside the log": bool(((counts < 0) | (counts > places.shape[1])).any()),
            f"log.{layer}.start outside the session": bool(((start < 0) | (start > closed)).any()),
            f"log.{layer}.positions that do not ascend within the session": bool((wrong_place & real).any()),
            f"log.{layer}.token_ids outside the vocabulary": bool(((ids < 0) | (ids >= vocab_size)).any()),
            f"log.{layer}.sources outside the labels": unknown(part["sources"]),
            f"log.{layer}.expires that should be over": bool((over & real).any()),
            f"log.{layer}.write stronger than write_strength": bool((part["write"] > write_strength * UNIT).any()),
            f"log.{layer}.write or ticks below 0 or above {UNIT}": bool(
                (doses < 0).any() or (part["ticks"] > UNIT).any()
            ),
            f"log.{layer}.keys longer than 1": bool((part["keys"].norm(dim=-1) > UNIT).any()),
        }
    _refuse(path, problems.items())


_LOG_PARTS = ("counts", "start", "positions", "token_ids", "sources", "expires", "write", "ticks", "keys")


def _refuse(path: str | Path, problems: Iterable[tuple[str, bool]]) -> None:
    for problem, found in problems:
        if found:
            raise DataError(f"session file {path}: holds {problem}; it is damaged, start a new session")
