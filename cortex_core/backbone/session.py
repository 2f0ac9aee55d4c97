"""A session: everything that a conversation or document has left in memory, and nothing else owns it.

It is small and its size does not depend on how much was read: per memory layer one matrix per head, the tokens of the
segment that is still open and, if asked for, a bounded log of what was written. The open segment is kept as tokens, so
that any split of an input over calls gives the same result.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from jaxtyping import Int
from safetensors.torch import save_file
from torch import Tensor

from cortex_core.backbone.passes import States
from cortex_core.backbone.segments import Rows
from cortex_core.backbone.session_tensors import log_tensors, row_tensors, state_tensors
from cortex_core.backbone.write_log import Write, WriteLog
from cortex_core.errors import ConfigError

SCHEMA = "cortex-session/3"


class Session:
    """The memory of a batch of independent readers. Made by `Cortex.new_session`, advanced by its calls."""

    def __init__(
        self,
        states: States,
        open_rows: Rows,
        start_tokens: Int[Tensor, " batch"],
        identity: dict[str, str],
        empty: States,
        log: WriteLog | None = None,
        before: Rows | None = None,
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
        self.log = log
        """What was written of late and can be taken back; None unless it was asked for."""
        self.before = before
        """The last tokens before the open segment, for a write filter; None without one."""

    @property
    def batch_size(self) -> int:
        return len(self.start_tokens)

    @property
    def num_tokens(self) -> Int[Tensor, " batch"]:
        """Tokens read so far, per row."""
        return self.start_tokens + self.open_rows.lengths

    @property
    def num_bytes(self) -> int:
        """Size of the state, the open segment and, if there is one, the log, in bytes."""
        start = self.start_tokens.numel() * self.start_tokens.element_size()
        kept = start + self.open_rows.num_bytes + sum(state.num_bytes for state in self.states.values())
        return kept + (self.log.num_bytes if self.log else 0) + (self.before.num_bytes if self.before else 0)

    def writes(self) -> list[Write]:
        """What the memory holds of single tokens, as far as the log goes: layer, position, token, source, strength.

        Tokens of the open segment are written when it closes. Raises ConfigError without a log.
        """
        if self.log is None:
            raise ConfigError("writes: this session keeps no log of its writes; open it with new_session(log_writes=…)")
        return list(self.log.writes())

    def fork(self) -> Session:
        """An independent copy: both go on from here without touching each other. Costs nothing: states are values."""
        return Session(
            dict(self.states), self.open_rows, self.start_tokens, self.identity, self.empty, self.log, self.before
        )

    def repeated(self, times: int) -> Session:
        """Each row as often, in turn: as many independent readers that know the same. Without the log."""
        if times < 1:
            raise ConfigError(f"times = {times}: at least 1")

        def again(part: torch.Tensor) -> torch.Tensor:
            return part.repeat_interleave(times, dim=0)

        def rows(of: Rows) -> Rows:
            return Rows(again(of.input_ids), again(of.reward), again(of.lengths))

        states = {layer: state.map(again) for layer, state in self.states.items()}
        before = None if self.before is None else rows(self.before)
        return Session(states, rows(self.open_rows), again(self.start_tokens), self.identity, self.empty, before=before)

    def wipe(self) -> None:
        """Forget what was written, and go on: the open segment, of which nothing is written yet, stays."""
        self.states = {n: s._replace(context=self.states[n].context) for n, s in self._empty_states().items()}
        if self.log is not None:
            self.log = self.log.emptied(self.states, self.start_tokens)

    def reset(self) -> None:
        """Forget everything: the session is as new."""
        self.states = self._empty_states()
        self.open_rows = Rows.empty(self.batch_size, self.start_tokens.device)
        self.start_tokens = torch.zeros_like(self.start_tokens)
        self.before = None
        if self.log is not None:
            self.log = self.log.emptied(self.states)
            self.open_rows = self.open_rows.with_tags()

    def _empty_states(self) -> States:
        batch = self.batch_size
        return {n: s.map(lambda part: part.expand(batch, *part.shape[1:])) for n, s in self.empty.items()}

    def save(self, path: str | Path, dtype: str = "float32") -> None:
        """Write one safetensors file; an existing one is replaced only once the new one is whole.

        `int8` keeps states as 8-bit numbers with a float32 scale per row of their last dimension, a quarter of the
        size and at most half a step of 1/127 of the row's largest entry away; they are float32 again when loaded.
        Raises ConfigError for another `dtype`.
        """
        path = Path(path)
        if dtype not in ("float32", "int8"):
            raise ConfigError(f"dtype = {dtype!r}: a session is saved as 'float32' or 'int8'")
        tensors = state_tensors("layer", self.states, dtype) | row_tensors("open", self.open_rows)
        tensors["start_tokens"] = self.start_tokens
        metadata = {"schema": SCHEMA, "identity": json.dumps(self.identity), "dtype": dtype}
        if self.before is not None:
            tensors |= row_tensors("before", self.before)
        if self.log is not None:
            tensors |= log_tensors(self.log, dtype)
            metadata["log"] = json.dumps({"capacity": self.log.capacity, "labels": self.log.labels})
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        save_file(tensors, partial, metadata=metadata)
        partial.replace(path)
