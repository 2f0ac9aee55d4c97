"""A session: everything that a conversation or document has left in memory, and nothing else owns it.

It is small and its size does not depend on how much was read: per memory layer one matrix per head, and the tokens of
the segment that is still open. The open segment is kept as tokens, so that any split of an input over calls gives the
same result.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cortex_core.backbone.passes import States
from cortex_core.backbone.segments import Rows
from cortex_core.errors import DataError, IncompatibleError
from cortex_core.fast_weights.state import FastWeights

SCHEMA = "cortex-session/1"


class Session:
    """The memory of a batch of independent readers. Made by `Cortex.new_session`, advanced by its calls."""

    def __init__(
        self,
        states: States,
        open_rows: Rows,
        start_tokens: Int[Tensor, " batch"],
        identity: dict[str, str],
        empty: States,
    ) -> None:
        self.states = states
        """Per memory layer, the state at the start of the open segment."""
        self.open_rows = open_rows
        """Tokens read since then, at most one segment per row."""
        self.start_tokens = start_tokens
        """Tokens read before the open segment, per row."""
        self.identity = identity
        """Fingerprints of the backbone and the sidecars that the state belongs to."""
        self.empty = empty
        """Per memory layer, the state of one row that has read nothing."""

    @property
    def batch_size(self) -> int:
        return len(self.start_tokens)

    @property
    def num_tokens(self) -> Int[Tensor, " batch"]:
        """Tokens read so far, per row."""
        return self.start_tokens + self.open_rows.lengths

    @property
    def num_bytes(self) -> int:
        """Size of the state and the open segment, in bytes."""
        tensors = [*self.open_rows, self.start_tokens]
        return sum(s.num_bytes for s in self.states.values()) + sum(t.numel() * t.element_size() for t in tensors)

    def fork(self) -> Session:
        """An independent copy: both go on from here without touching each other. Costs nothing: states are values."""
        return Session(dict(self.states), self.open_rows, self.start_tokens, self.identity, self.empty)

    def reset(self) -> None:
        """Forget everything: the session is as new."""
        batch, device = self.batch_size, self.start_tokens.device
        self.states = {layer: s.map(lambda part: part.expand(batch, -1, -1, -1)) for layer, s in self.empty.items()}
        self.open_rows = Rows.empty(batch, device)
        self.start_tokens = torch.zeros_like(self.start_tokens)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; an existing one is replaced only once the new one is whole."""
        path = Path(path)
        tensors = {
            f"layer.{layer}.{name}": part
            for layer, state in self.states.items()
            for name, part in state._asdict().items()
            if part is not None
        }
        tensors |= {f"open.{name}": value for name, value in self.open_rows._asdict().items()}
        tensors["start_tokens"] = self.start_tokens
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        save_file(tensors, partial, metadata={"schema": SCHEMA, "identity": json.dumps(self.identity)})
        partial.replace(path)


def load_session(path: str | Path, like: Session, segment_tokens: int, vocab_size: int) -> Session:
    """Read a saved session that fits `like` in everything but the batch size.

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
    if metadata.get("schema") != SCHEMA:
        raise DataError(f"session file {path}: schema is {metadata.get('schema')!r}, this version reads {SCHEMA!r}")
    _check_identity(path, metadata.get("identity", ""), like.identity)
    _check_tensors(path, tensors, like, segment_tokens)
    _check_values(path, tensors, vocab_size)
    device = like.start_tokens.device
    tensors = {name: value.to(device) for name, value in tensors.items()}
    states = {n: FastWeights(tensors[f"layer.{n}.up"], tensors.get(f"layer.{n}.down")) for n in like.states}
    rows = Rows(tensors["open.input_ids"], tensors["open.reward"], tensors["open.lengths"])
    return Session(states, rows, tensors["start_tokens"], like.identity, like.empty)


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


def _check_tensors(path: str | Path, tensors: dict[str, Tensor], like: Session, segment_tokens: int) -> None:
    if "start_tokens" not in tensors:
        raise DataError(f"session file {path}: start_tokens is missing; it is damaged, start a new session")
    batch = len(tensors["start_tokens"])
    open_tokens = tensors["open.input_ids"].shape[-1] if "open.input_ids" in tensors else 0
    expected = {
        f"layer.{layer}.{name}": ((batch, *part.shape[1:]), part.dtype)
        for layer, state in like.states.items()
        for name, part in state._asdict().items()
        if part is not None
    }
    expected |= {
        "open.input_ids": ((batch, open_tokens), torch.int64),
        "open.reward": ((batch, open_tokens), torch.float32),
        "open.lengths": ((batch,), torch.int64),
        "start_tokens": ((batch,), torch.int64),
    }
    for name, (shape, dtype) in expected.items():
        value = tensors.get(name)
        if value is None or tuple(value.shape) != tuple(shape) or value.dtype != dtype:
            got = "missing" if value is None else f"{value.dtype} {list(value.shape)}"
            raise DataError(f"session file {path}: {name} is {got}, expected {dtype} {list(shape)}")
    if batch == 0 or open_tokens > segment_tokens:
        raise DataError(
            f"session file {path}: {batch} rows of {open_tokens} open tokens; a segment has {segment_tokens}"
        )


def _check_values(path: str | Path, tensors: dict[str, Tensor], vocab_size: int) -> None:
    ids, lengths = tensors["open.input_ids"], tensors["open.lengths"]
    problems = {
        "open.input_ids outside the vocabulary": bool(((ids < 0) | (ids >= vocab_size)).any()),
        "open.lengths outside the open segment": bool(((lengths < 0) | (lengths > ids.shape[1])).any()),
        "negative start_tokens": bool((tensors["start_tokens"] < 0).any()),
        "numbers that are not finite": not all(bool(torch.isfinite(t).all()) for t in tensors.values()),
    }
    for problem, found in problems.items():
        if found:
            raise DataError(f"session file {path}: holds {problem}; it is damaged, start a new session")
