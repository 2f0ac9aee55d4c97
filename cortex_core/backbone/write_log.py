"""What a session has written of late: a bounded log per memory layer, from which single writes can be taken back.

The state is what the log's base becomes by replaying the log. Write gates are exactly 0 on most tokens, so the log is
short. When it is full, its oldest writes become part of the base and stay. A log is a value: changes make a new one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from cortex_core.backbone.segments import NEVER, NO_SOURCE, Rows
from cortex_core.errors import ConfigError
from cortex_core.fast_weights.replay import Written, replay
from cortex_core.fast_weights.sidecar import Sidecar
from cortex_core.fast_weights.state import FastWeights


@dataclass(frozen=True)
class Write:
    """One token that one layer has written, as `Session.writes` tells it."""

    layer: int
    row: int
    position: int
    """Tokens read before it in its session."""
    token_id: int
    source: str | None
    """The label that it was read with."""
    strength: float
    """Mean over heads of how strongly it was written."""
    expires: int | None
    """Position from which on it is no longer remembered; None is never."""


class LayerLog(NamedTuple):
    """The writes of one layer, oldest first; rows are ragged, padded on the right."""

    base: FastWeights
    """The state at `start`, its matrices alone."""
    start: Int[Tensor, " batch"]
    counts: Int[Tensor, " batch"]
    positions: Int[Tensor, "batch writes"]
    token_ids: Int[Tensor, "batch writes"]
    sources: Int[Tensor, "batch writes"]
    expires: Int[Tensor, "batch writes"]
    written: Written

    @classmethod
    def empty(cls, base: FastWeights, key_dim: int) -> LayerLog:
        """Nothing was written since `base`."""
        base = base.matrices
        batch, heads, _, value_dim = base.up.shape
        start = torch.zeros(batch, dtype=torch.long, device=base.up.device)
        numbers, doses = start.new_zeros(batch, 0), base.up.new_zeros(batch, heads, 0)
        keys, values = (doses.new_zeros(batch, heads, 0, width) for width in (key_dim, value_dim))
        return cls(base, start, start, numbers, numbers, numbers, numbers, Written(keys, values, doses, doses))

    @property
    def valid(self) -> Bool[Tensor, "batch writes"]:
        """True at writes, False at padding."""
        return torch.arange(self.positions.shape[1], device=self.counts.device) < self.counts[:, None]

    def where(self, kept: Bool[Tensor, "batch writes"]) -> LayerLog:
        """Some of its writes."""
        kept = kept & self.valid
        counts = kept.sum(1)
        index = torch.argsort(~kept, dim=1, stable=True)[:, : int(counts.max())]
        numbers = {name: getattr(self, name).gather(1, index) for name in _NUMBERS}
        return self._replace(counts=counts, **numbers, written=self.written.at(index))

    def then(self, other: LayerLog) -> LayerLog:
        """Its writes, followed by those of `other`."""
        numbers = {name: torch.cat([getattr(log, name) for log in (self, other)], dim=1) for name in _NUMBERS}
        kept = torch.cat([self.valid, other.valid], dim=1)
        counts = torch.full_like(self.counts, kept.shape[1])
        return self._replace(counts=counts, **numbers, written=self.written.then(other.written)).where(kept)

    def replayed(self, sidecar: Sidecar, stop: Int[Tensor, " batch"]) -> FastWeights:
        """The matrices at position `stop`."""
        config = sidecar.config
        with torch.autocast(self.start.device.type, enabled=False):
            return replay(
                sidecar.rule(), self.written, self.positions, self.counts, self.base, self.start, stop,
                per_token=config.decay_per == "token", chunk_size=config.chunk_size,
            )  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        """All parts by name, for a file."""
        parts = {"start": self.start, "counts": self.counts} | {name: getattr(self, name) for name in _NUMBERS}
        return parts | self.written._asdict()

    @classmethod
    def from_tensors(cls, base: FastWeights, parts: Mapping[str, Tensor]) -> LayerLog:
        """The inverse of `tensors`."""
        written = Written(*(parts[name] for name in Written._fields))
        numbers = {name: parts[name] for name in _NUMBERS}
        return cls(base, parts["start"], parts["counts"], **numbers, written=written)


_NUMBERS = ("positions", "token_ids", "sources", "expires")


@dataclass(frozen=True)
class WriteLog:
    """The log of a session."""

    capacity: int
    """Writes that are kept per row and layer."""
    labels: tuple[str, ...]
    """Every source that was named, in the order of their numbers."""
    folded: Bool[Tensor, "batch labels"]
    """Whether writes of a row and source have become part of the base."""
    layers: Mapping[int, LayerLog]

    @classmethod
    def empty(cls, capacity: int, sidecars: Mapping[int, Sidecar], states: Mapping[int, FastWeights]) -> WriteLog:
        """The log of a session that begins with `states`. Raises ConfigError unless it keeps at least one write."""
        if capacity < 1:
            raise ConfigError(f"log_writes = {capacity}: keep at least 1 write, or None for no log")
        layers = {}
        for layer, state in states.items():
            addresses = sidecars[layer].addresses
            layers[layer] = LayerLog.empty(state, addresses.content.shape[1] // addresses.heads)
        first = next(iter(states.values())).up
        return cls(capacity, (), torch.zeros(len(first), 0, dtype=torch.bool, device=first.device), layers)

    def emptied(self, states: Mapping[int, FastWeights], start: Int[Tensor, " batch"] | None = None) -> WriteLog:
        """The log of a session that begins anew with `states`, at position 0 or `start`."""
        layers = {n: LayerLog.empty(state, self.layers[n].written.keys.shape[-1]) for n, state in states.items()}
        if start is not None:
            layers = {n: log._replace(start=start) for n, log in layers.items()}
        return WriteLog(self.capacity, (), self.folded[:, :0], layers)

    @property
    def num_bytes(self) -> int:
        """Size of all of it, in bytes."""
        tensors = [part for log in self.layers.values() for part in log.tensors().values()]
        bases = sum(log.base.num_bytes for log in self.layers.values())
        return bases + sum(t.numel() * t.element_size() for t in [*tensors, self.folded])

    def named(self, label: str) -> tuple[WriteLog, int]:
        """The log that knows this source, and its number."""
        if label in self.labels:
            return self, self.labels.index(label)
        folded = torch.nn.functional.pad(self.folded, (0, 1))
        return replace(self, labels=(*self.labels, label), folded=folded), len(self.labels)

    def writes(self) -> Iterator[Write]:
        """All writes, layer by layer, row by row, in order."""
        for layer, log in self.layers.items():
            strengths = log.written.write.mean(1).tolist()
            numbers = [getattr(log, name).tolist() for name in _NUMBERS]
            for row, count in enumerate(log.counts.tolist()):
                for n in range(count):
                    position, token, source, expires = (part[row][n] for part in numbers)
                    label = None if source == NO_SOURCE else self.labels[source]
                    until = None if expires == NEVER else expires
                    yield Write(layer, row, position, token, label, strengths[row][n], until)

    # --- while reading -----------------------------------------------------------------------------------------------

    def until_expiry(self, rows: Rows, start: Int[Tensor, " batch"], width: int, first: int) -> int:
        """Segments, counted from `start`, before the first boundary after segment `first` where something expires."""
        assert rows.tags is not None
        expiries = [log.expires.where(log.valid, NEVER) for log in self.layers.values()]
        expiries.append(rows.tags.expires.where(rows.valid, NEVER))
        boundary = (torch.cat(expiries, dim=1) - start[:, None] + width - 1) // width
        later = boundary[boundary > first]
        return int(later.min()) if later.numel() else NEVER

    def extended(
        self,
        written: Mapping[int, Written],
        rows: Rows,
        closed: Bool[Tensor, "batch tokens"],
        positions: Int[Tensor, "batch tokens"],
    ) -> WriteLog:
        """With the writes of the tokens `rows`, those of closed segments. `positions` are theirs in the session."""
        assert rows.tags is not None
        layers = {}
        for layer, log in self.layers.items():
            tags, real = rows.tags, closed & rows.valid & (written[layer].write > 0).any(1)
            counts = torch.full_like(log.counts, real.shape[1])
            new = LayerLog(
                log.base, log.start, counts, positions, rows.input_ids, tags.source, tags.expires, written[layer]
            )
            layers[layer] = log.then(new.where(real))
        return replace(self, layers=layers)

    def without(
        self,
        gone: Mapping[int, Bool[Tensor, "batch writes"]],
        sidecars: Mapping[int, Sidecar],
        states: Mapping[int, FastWeights],
        stop: Int[Tensor, " batch"],
    ) -> tuple[WriteLog, dict[int, FastWeights]]:
        """The log and the states at `stop` as if some writes had not happened. Rows that lose none keep their state."""
        layers, after = dict(self.layers), dict(states)
        for layer, log in self.layers.items():
            lost = gone[layer] & log.valid
            if bool(lost.any()):
                layers[layer] = log.where(~lost)
                # A row that has not read as far as `stop` keeps its state and loses nothing: no replay beyond its end.
                replayed = layers[layer].replayed(sidecars[layer], stop)._replace(context=states[layer].context)
                after[layer] = FastWeights.where(lost.any(1), replayed, states[layer])
        return replace(self, layers=layers), after

    def fitted(self, sidecars: Mapping[int, Sidecar]) -> WriteLog:
        """No longer than its capacity: older writes become part of the base. Raises ConfigError if one expires."""
        layers, folded = dict(self.layers), self.folded
        for layer, log in self.layers.items():
            excess = (log.counts - self.capacity).clamp_min(0)
            old = torch.arange(log.positions.shape[1], device=excess.device) < excess[:, None]
            if not bool(old.any()):
                continue
            if bool((log.expires[old] != NEVER).any()):
                raise ConfigError(
                    f"log_writes = {self.capacity} is too few for ttl_tokens: a write that has not expired yet would "
                    "leave the log and stay for good. Keep more writes, or give them less time"
                )
            oldest = log.where(old)
            stop = oldest.positions.gather(1, (oldest.counts - 1).clamp_min(0)[:, None])[:, 0] + 1
            stop = torch.where(oldest.counts > 0, stop, log.start)
            base = FastWeights.where(excess > 0, oldest.replayed(sidecars[layer], stop), log.base)
            layers[layer] = log.where(~old)._replace(base=base, start=stop)
            folded = folded | _seen(oldest, folded.shape[1])
        return replace(self, layers=layers, folded=folded)


def _seen(log: LayerLog, num_labels: int) -> Bool[Tensor, "batch labels"]:
    """Which sources occur in each row of a log."""
    found = torch.zeros(len(log.counts), num_labels + 1, dtype=torch.bool, device=log.counts.device)
    index = log.sources.where(log.valid & (log.sources != NO_SOURCE), num_labels)
    return found.scatter(1, index, torch.ones_like(index, dtype=torch.bool))[:, :num_labels]
