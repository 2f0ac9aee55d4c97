"""What is kept of a surprising segment: its tokens, how surprising it was, and what it did to each memory layer.

Reading goes on in calls, and a segment may lie in several. `record` is given what a call read and returns the segments
that ended in it; what is still open goes in and comes out as a value, like every state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cortex_core.backbone.session import Session
from cortex_core.consolidation.moments import Moments
from cortex_core.consolidation.segments import Marks
from cortex_core.errors import ConfigError, DataError
from cortex_core.fast_weights.sidecar import Sidecar
from cortex_core.fast_weights.state import FastWeights

StatesAt = Callable[[int, int], Mapping[int, FastWeights]]
"""(row, position) to each layer's state, of a batch of one, before the token at that position was read."""


@dataclass(frozen=True)
class LayerStats:
    """What one memory layer saw and did during a segment. On the CPU, float32."""

    mean: Float[Tensor, " hidden"]
    """Of the layer's input over the tokens."""
    variance: Float[Tensor, " hidden"]
    """Mean squared distance from it."""
    delta_up: Float[Tensor, "heads rank head_dim"]
    """`FastWeights.up` after the segment, less before."""
    delta_down: Float[Tensor, "heads key_dim rank"] | None = None
    """The same of `FastWeights.down`; None for the delta rule."""


@dataclass(frozen=True)
class Segment:
    """A run of tokens that was worth keeping."""

    token_ids: Int[Tensor, " tokens"]
    first: int
    """Position of its first token in its stream."""
    stop: int
    """Position after its last."""
    peak_surprise: float
    mean_surprise: float
    stats: Mapping[int, LayerStats]
    """By layer."""
    source: str
    """Label of the stream: a session, a document."""
    step: int
    """Step of the run at which it ended."""

    @property
    def num_tokens(self) -> int:
        return self.stop - self.first

    def payload(self) -> tuple[dict[str, Tensor], dict[str, str | int | float]]:
        """As named tensors and notes, which a `ReplayBuffer` keeps."""
        tensors = {"token_ids": self.token_ids}
        for layer, stats in self.stats.items():
            parts = {name: getattr(stats, name) for name in LayerStats.__dataclass_fields__}
            tensors |= {f"{layer}.{name}": part for name, part in parts.items() if part is not None}
        return tensors, {name: getattr(self, name) for name in _NOTES}

    @classmethod
    def from_payload(cls, tensors: Mapping[str, Tensor], notes: Mapping[str, str | int | float]) -> Segment:
        """The inverse. Raises DataError for anything that is no segment: it may come from a file."""
        by_layer: dict[int, dict[str, Tensor]] = {}
        try:
            kept = {name: notes[name] for name in _NOTES}
            wrong = [name for name, kind in _NOTES.items() if type(kept[name]) is not kind]
            if wrong or tensors["token_ids"].shape != (notes["stop"] - notes["first"],):  # type: ignore[operator]
                raise ValueError(f"{wrong[0]} is {kept[wrong[0]]!r}" if wrong else "not as many tokens as positions")
            for name, part in tensors.items():
                if name != "token_ids":
                    layer, _, field = name.partition(".")
                    by_layer.setdefault(int(layer), {})[field] = part
            stats = {layer: LayerStats(**parts) for layer, parts in sorted(by_layer.items())}
            odd = [n for n, s in stats.items() if s.mean.shape != s.variance.shape or s.delta_up.dim() != 3]
            if odd:
                raise ValueError(f"the statistics of layer {odd[0]} do not fit each other")
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"not a segment ({type(error).__name__}: {str(error).strip().splitlines()[0]})") from error
        return cls(token_ids=tensors["token_ids"], stats=stats, **kept)  # type: ignore[arg-type]


_NOTES = {"first": int, "stop": int, "peak_surprise": float, "mean_surprise": float, "source": str, "step": int}


class Chunk(NamedTuple):
    """What one call has read. Rows are streams; padding comes last."""

    token_ids: Int[Tensor, "batch tokens"]
    surprise: Float[Tensor, "batch tokens"]
    hidden: Mapping[int, Float[Tensor, "batch tokens hidden"]]
    """By memory layer, what the layer was given."""
    start: Int[Tensor, " batch"]
    """Position of each row's first token."""


@dataclass(frozen=True)
class OpenSegment:
    """A segment that has not ended yet: sums over its tokens so far."""

    first: int
    token_ids: Int[Tensor, " tokens"]
    peak_surprise: float
    total_surprise: float
    moments: Mapping[int, Moments]
    start: Mapping[int, FastWeights]
    """Each layer's state before its first token."""

    def then(self, chunk: Chunk, row: int, tokens: slice) -> OpenSegment:
        """With further tokens."""
        surprise = chunk.surprise[row, tokens].detach().double()
        if not len(surprise):
            return self
        return replace(
            self,
            token_ids=torch.cat([self.token_ids, chunk.token_ids[row, tokens].cpu()]),
            peak_surprise=max(self.peak_surprise, float(surprise.max())),
            total_surprise=self.total_surprise + float(surprise.sum()),
            moments={
                layer: moments.merge(Moments.of(chunk.hidden[layer][row, tokens]))
                for layer, moments in self.moments.items()
            },
        )

    def ended(self, end: Mapping[int, FastWeights], source: str, step: int) -> Segment:
        """As a record, given the states after its last token."""
        count = len(self.token_ids)
        stats = {layer: _stats(moments, self.start[layer], end[layer]) for layer, moments in self.moments.items()}
        mean = self.total_surprise / count
        return Segment(
            self.token_ids, self.first, self.first + count, self.peak_surprise, mean, stats, source, step
        )  # fmt: skip


def _stats(moments: Moments, start: FastWeights, end: FastWeights) -> LayerStats:
    def change(name: str) -> Tensor | None:
        before, after = getattr(start, name), getattr(end, name)
        return None if before is None else (after - before)[0].detach().float().cpu()

    up = change("up")
    assert up is not None
    return LayerStats(moments.mean.cpu(), moments.variance.cpu(), up, change("down"))


Opened = tuple[OpenSegment | None, ...]
"""Per row, the segment that is open."""


@torch.no_grad()
def record(
    chunk: Chunk, marks: Marks, initial_state: Opened, states_at: StatesAt, *, sources: Sequence[str], step: int
) -> tuple[list[Segment], Opened]:
    """The segments that ended in `chunk`, by row and then by position, and those that are open after it.

    `marks` are what `detect` said about the same tokens. `states_at` is asked at borders of segments only: it may
    replay a log (`states_of_session`), or know the states at the borders of calls and give the nearest.
    """
    done, after = [], []
    for row, opened in enumerate(initial_state):
        segments, opened = _record_row(chunk, marks, row, opened, states_at, sources[row], step)
        done += segments
        after.append(opened)
    return done, tuple(after)


def _record_row(
    chunk: Chunk, marks: Marks, row: int, opened: OpenSegment | None, states_at: StatesAt, source: str, step: int
) -> tuple[list[Segment], OpenSegment | None]:
    start, done = int(chunk.start[row]), []
    borders = (marks.opened[row] | marks.closed[row]).nonzero()[:, 0].tolist()
    length = int(marks.inside[row].nonzero()[:, 0].max()) + 1 if bool(marks.inside[row].any()) else 0
    at = 0
    for border in borders:
        if marks.closed[row, border]:
            assert opened is not None
            opened = opened.then(chunk, row, slice(at, border))
            done.append(opened.ended(states_at(row, start + border), source, step))
            opened = None
        if marks.opened[row, border]:
            states = {layer: state.matrices for layer, state in states_at(row, start + border).items()}
            opened = _begin(chunk, start + border, states)
        at = border
    if opened is not None:
        opened = opened.then(chunk, row, slice(at, max(at, length)))
    return done, opened


def _begin(chunk: Chunk, position: int, states: Mapping[int, FastWeights]) -> OpenSegment:
    no_tokens = chunk.token_ids.new_zeros(0, device="cpu")
    moments = {layer: Moments.zeros(x.shape[-1], device=x.device) for layer, x in chunk.hidden.items()}
    return OpenSegment(position, no_tokens, 0.0, 0.0, moments, states)


def finish(initial_state: Opened, states_at: StatesAt, *, sources: Sequence[str], step: int) -> list[Segment]:
    """The segments that are still open where their streams end, as they are: they may be shorter than `min_tokens`."""
    return [
        opened.ended(states_at(row, opened.first + len(opened.token_ids)), sources[row], step)
        for row, opened in enumerate(initial_state)
        if opened is not None and len(opened.token_ids)
    ]


def states_of_session(session: Session, sidecars: Mapping[int, Sidecar]) -> StatesAt:
    """Exact states at any position between what a session's log reaches back to and its open segment, by replaying."""
    log = session.log
    if log is None:
        raise ConfigError("this session keeps no log of its writes; open it with new_session(log_writes=…)")

    def states_at(row: int, position: int) -> dict[int, FastWeights]:
        if position > (written := int(session.start_tokens[row])):
            raise ConfigError(
                f"position {position}: row {row} has written up to {written}, what follows is its open segment; "
                "record what was read once its segment has closed"
            )
        states = {}
        for layer, entries in log.layers.items():
            if position < (base := int(entries.start[row])):
                raise ConfigError(
                    f"position {position}: the log of layer {layer} reaches back to {base}; open the session with more "
                    f"log_writes than {log.capacity}, or record more often"
                )
            stop = torch.full_like(entries.start, position).maximum(entries.start)
            state = entries.where(entries.positions < stop[:, None]).replayed(sidecars[layer], stop)
            states[layer] = state.map(lambda part: part[row : row + 1])
        return states

    return states_at
