"""What was written, one by one: the line, the question for it, what should be answered, and where it lies in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cortex_core.backbone.session import Session
from cortex_core.errors import ConfigError, DataError

FloatArray = NDArray[np.float32]
Tokens = tuple[int, ...]


class Memory(NamedTuple):
    """One thing that was written. Token ids."""

    id: int
    """Given once, in the order in which memories come."""
    tokens: Tokens
    """The line, as it was read."""
    cue: Tokens
    """What asks for it."""
    answer: Tokens
    """What was written, and should come after the cue. Empty where nobody can say."""
    context: Tokens
    """What stood before the line."""
    position: int
    """Tokens of the stream before what was written."""
    segment: int
    """Of the segments, days or episodes of the stream, the one that it was read in."""
    address: FloatArray
    """Where it lies in memory: memories with similar addresses get into each other's way."""
    importance: float
    """At least 0: what it is kept for, and how often dreams begin with it."""


class Span(NamedTuple):
    """What of the stream belongs to one that was written, in tokens."""

    before: int = 2
    """Of the line, before what was written."""
    after: int = 1
    """Of the line, after it."""
    cue: int = 1
    """Before what was written, that ask for it."""
    context: int = 16
    """Before the line, that give the scene."""


def written(
    session: Session,
    tokens: Sequence[int],
    first: int,
    question: Sequence[int],
    *,
    span: Span = Span(),  # noqa: B008 (immutable)
    min_write: float = 0.05,
    segment: int = 0,
    next_id: int = 0,
) -> list[Memory]:
    """What the one row of `session` still has in its log, with a strength of `min_write` or more: writes by mistake are
    mostly weaker.

    `tokens` are the stream from position `first` on; what was written outside them, or too near to their start to have
    a line, is passed over. `question` stands before the cue when it is asked for. Addresses are the keys with which the
    layers have written, one after the other; zeros for a layer that has not. Raises ConfigError without a log, or for
    more than one row.
    """
    if session.log is None or session.batch_size != 1:
        raise ConfigError(
            f"written: the session has {session.batch_size} rows and {'no' if session.log is None else 'a'} log of its "
            "writes; memories are those of one row with a log: new_session(1, log_writes=…)"
        )
    strengths: dict[int, list[float]] = {}
    keys: dict[int, dict[int, FloatArray]] = {}
    widths = {}
    for layer, log in session.log.layers.items():
        by_write = log.written.keys[0].detach().float().cpu().permute(1, 0, 2).flatten(1)  # [writes, heads * key_dim]
        widths[layer] = by_write.shape[1]
        count = int(log.counts[0])
        doses = log.written.write[0].detach().float().mean(0)[:count].tolist()
        for at, (position, dose) in enumerate(zip(log.positions[0][:count].tolist(), doses, strict=True)):
            strengths.setdefault(position, []).append(dose)
            keys.setdefault(position, {})[layer] = by_write[at].numpy()
    found = []
    for position in sorted(strengths):
        at, strength = position - first, max(strengths[position])
        line = at - max(span.before, span.cue)
        if strength < min_write or line < 0 or at >= len(tokens):
            continue
        parts = [keys[position].get(layer, np.zeros(width, np.float32)) for layer, width in widths.items()]
        found.append(
            Memory(
                next_id + len(found),
                tuple(map(int, tokens[at - span.before : at + 1 + span.after])),
                (*map(int, question), *map(int, tokens[at - span.cue : at])),
                (int(tokens[at]),),
                tuple(map(int, tokens[max(0, at - span.before - span.context) : at - span.before])),
                position,
                segment,
                np.concatenate(parts),
                strength,
            )
        )
    return found


def checked(memories: Iterable[Memory]) -> tuple[Memory, ...]:
    """Memories by id. Raises DataError for two of the same id, numbers that are not finite, unlike addresses."""
    ordered = tuple(sorted(memories, key=lambda memory: memory.id))
    for memory, after in pairwise(ordered):
        if memory.id == after.id:
            raise DataError(f"memory {memory.id} is there twice: ids are given once")
        if memory.address.shape != after.address.shape:
            raise DataError(
                f"memory {after.id} has an address of shape {after.address.shape}, memory {memory.id} one of "
                f"{memory.address.shape}: a graph holds memories of one model"
            )
    for memory in ordered:
        if memory.address.ndim != 1 or not np.isfinite(memory.address).all():
            raise DataError(f"memory {memory.id}: its address must be a vector of finite numbers")
        if not (np.isfinite(memory.importance) and memory.importance >= 0):
            raise DataError(f"memory {memory.id}: importance = {memory.importance} must be finite and at least 0")
        if not memory.cue or not memory.tokens:
            raise DataError(f"memory {memory.id} has no cue or no line: leave it out, nothing asks for it")
    return ordered


def addresses(memories: Sequence[Memory]) -> torch.Tensor:
    """All addresses, [memories, width]."""
    width = len(memories[0].address) if memories else 0
    table = np.zeros((len(memories), width), np.float32)
    for row, memory in enumerate(memories):
        table[row] = memory.address
    return torch.from_numpy(table)
