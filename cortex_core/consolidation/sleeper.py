"""A reader that sleeps: reads by day, and every so many tokens moves what it has written into slow weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from cortex_core import files
from cortex_core.backbone.model import Cortex
from cortex_core.backbone.prompts import Prompts
from cortex_core.backbone.session import Session
from cortex_core.config import ReplayConfig, SleepConfig
from cortex_core.consolidation import sleep
from cortex_core.consolidation.guard import DriftGuard
from cortex_core.consolidation.lessons import Lessons, Taught, cues, lessons
from cortex_core.consolidation.replay import Item, ReplayBuffer
from cortex_core.consolidation.spread import fitted, spread_addresses, unfitted
from cortex_core.errors import ConfigError, DataError, IncompatibleError

SCHEMA = "cortex-sleeper/1"
SESSION, REPLAY, SLOW = "session.safetensors", "replay.safetensors", "slow.safetensors"
LOG_WRITES = 4096
"""Writes of a day that can give a question; it sleeps before there are as many, whatever was agreed."""

Encode = Callable[[str], Sequence[int]]
"""Text to token ids, without special tokens."""


@runtime_checkable
class DreamSource(Protocol):
    """Where lessons come from that nobody kept."""

    def dream(self) -> dict[str, float]:
        """Tonight's dreams, of what was written on earlier days. Returns metrics."""
        ...

    def draw(self, most: int) -> Lessons:
        """Some of those that may be learned from."""
        ...

    def remember(self, session: Session, day: Sequence[int], began: int) -> None:
        """What this day has written: its tokens, the first at position `began`."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write what is remembered."""
        ...

    def load(self, folder: str | Path) -> None:
        """Go on from `save`."""
        ...


class Slept(NamedTuple):
    """What a night was like."""

    metrics: dict[str, float]
    kept: bool
    """False if the guard had it undone."""


class Sleeper:
    """One reader of a model, with its session, its buffer of old lessons, and the model's slow weights in its care.

    `session.wipe()` ends every night: what the slow weights have not learned by then is gone.
    """

    def __init__(
        self,
        model: Cortex,
        config: SleepConfig | None = None,
        replay: ReplayConfig | None = None,
        *,
        encode: Encode,
        guard: DriftGuard | None = None,
        dreams: DreamSource | None = None,
        after_backward: Callable[[], None] = lambda: None,
    ) -> None:
        """`encode` is for the words of the questions; `dreams` for `sleep.dream_frac`; `after_backward` is called where
        shards are to be let go. Without a `guard` every night counts. Raises ConfigError for a memory that cannot have
        slow weights."""
        self.model, self.config = model, config or SleepConfig()
        questions = [tuple(encode(text)) if text else () for text in self.config.questions]
        if not model.fast_weights.slow_slots:
            model.grow_slow_weights(self.config.slots, self.config.active)
            spread_addresses(model, questions)
        self.buffer = ReplayBuffer(replay or ReplayConfig())
        self.session = model.new_session(log_writes=LOG_WRITES)
        self.guard, self.dreams, self._after_backward = guard, dreams, after_backward
        if self.config.dream_frac and dreams is None:
            raise ConfigError(f"dream_frac = {self.config.dream_frac}: needs `dreams`; give them, or set it to 0")
        self.num_nights = self.num_undone = 0
        self.encode = encode
        self._questions = questions
        self._day: list[int] = []
        self._began = 0  # position of the first token of `_day`

    @property
    def num_tokens(self) -> int:
        """Tokens read so far."""
        return self._began + len(self._day)

    def read(self, tokens: Sequence[int]) -> list[Slept]:
        """Read on, and sleep whenever a day is over. Returns the nights on the way."""
        nights = []
        for piece in self._pieces(tokens):
            self._day += piece
            self.model.read(torch.tensor(piece, device=self.model.backbone.device)[None], self.session)
            if int(self.session.start_tokens[0]) - self._began >= self.config.every_tokens:
                nights.append(self.sleep())
        return nights

    def _pieces(self, tokens: Sequence[int]) -> Iterator[list[int]]:
        """Parts that end with the first token of a segment: it is what has the segment before it written, and a night
        that comes later has the next segment's tokens between what was written and the questions about it."""
        width, at = self.model.segment_tokens, 0
        while at < len(tokens):
            inside = self.num_tokens % width
            end = at + (1 if inside == 0 else width + 1 - inside)
            yield list(tokens[at:end])
            at = end

    def sleep(self) -> Slept:
        """Move what the closed segments of the day have left into slow weights, and wipe the fast ones."""
        tonight = self.lessons()
        metrics = {"sleep/lessons": float(len(tonight)), "sleep/buffer_items": float(len(self.buffer))}
        if self.dreams is not None and self.config.dream_frac:
            metrics |= self.dreams.dream()
        kept = True
        if len(tonight):
            learned, kept = self.learn(tonight)
            metrics |= learned
            if kept and self.config.dream_frac < 1:
                self._keep(tonight)
        if self.dreams is not None:
            self.dreams.remember(self.session, self._day, self._began)
        self.buffer.sleep_passed()
        self.num_nights += 1
        self.num_undone += not kept
        self._wake()
        return Slept(metrics | {"sleep/undone": float(not kept)}, kept)

    def learn(self, tonight: Lessons, penalty: Callable[[sleep.SlowValues], Tensor] | None = None) -> Slept:
        """Teach the slow weights tonight's lessons, among old ones; `penalty` as of `consolidate`. To be overridden by
        readers that learn in another way."""
        night = sleep.consolidate(self.model, tonight, self._replayed, self.config, penalty, self._after_backward)
        metrics = dict(night.metrics)
        return Slept(metrics, self._merge(night, metrics))

    def lessons(self) -> Lessons:
        """What there is to learn tonight, most of it first."""
        asked = dict.fromkeys((*words, *cue) for words in self._questions for cue in self._cues())
        config = self.config
        found = lessons(self.model, self.session, Prompts.of(list(asked)), config.top_tokens, config.batch_size)
        order = found.gain_nats.argsort(descending=True, stable=True)
        worth = order[found.gain_nats[order] >= config.min_gain_nats]
        return found.at(worth[: config.max_lessons])

    def _cues(self) -> list[list[int]]:
        strong = [write.position for write in self.session.writes() if write.strength >= self.config.min_write]
        return cues(self._day, self._began, strong, self.config.cue_tokens)

    def _merge(self, night: sleep.Night, metrics: dict[str, float]) -> bool:
        values = sleep.slow_values(self.model)
        before = {name: value.detach().clone() for name, value in values.items()}
        sleep.add(self.model, night.delta)
        if self.guard is None:
            return True
        metrics["sleep/drift_nats"] = drift = self.guard.drift(self.model)
        if self.guard.allows(drift):
            return True
        for name, value in values.items():
            value.data.copy_(before[name])
        return False

    def save(self, folder: str | Path) -> None:
        """Write everything but the sidecars and the settings into a folder, the file that `load` needs first last."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.session.save(folder / SESSION)
        self.buffer.save(folder / REPLAY)
        if self.dreams is not None:
            self.dreams.save(folder)
        notes = {name: getattr(self, name) for name in ("num_nights", "num_undone", "_began", "_day")}
        files.write(folder / SLOW, SCHEMA, {**sleep.slow_values(self.model), **fitted(self.model)}, notes)

    def load(self, folder: str | Path) -> None:
        """Go on from `save`, with the same sidecars and settings. Raises DataError (missing, damaged),
        IncompatibleError (of another model)."""
        folder = Path(folder)
        found, notes = files.read(folder / SLOW, SCHEMA, "slow weights")
        session = self.model.load_session(folder / SESSION)
        buffer = ReplayBuffer.load(folder / REPLAY, self.buffer.config)
        values = {**sleep.slow_values(self.model), **fitted(self.model)}
        found = unfitted(self.model) | found  # which older files do not have
        wrong = {n: tuple(v.shape) for n, v in found.items()} != {n: tuple(v.shape) for n, v in values.items()}
        if wrong:
            raise IncompatibleError(
                f"{folder / SLOW}: slow weights of other layers or sizes than sleep.slots = {self.config.slots} and "
                "these sidecars give. Go on with the settings and sidecars that it was saved with"
            )
        day, counters = _counters(folder / SLOW, notes)
        if self.dreams is not None:
            self.dreams.load(folder)
        for name, value in values.items():
            value.data.copy_(found[name])
        self.session, self.buffer, self._day = session, buffer, day
        self.num_nights, self.num_undone, self._began = counters

    def _wake(self) -> None:
        self.session.wipe()
        position = int(self.session.start_tokens[0])
        self._day, self._began = self._day[position - self._began :], position

    def _keep(self, tonight: Lessons) -> None:
        for at in range(len(tonight)):
            gain = float(tonight.gain_nats[at])
            length = int(tonight.prompts.lengths[at])
            tensors = {"prompt": tonight.prompts.input_ids[at, :length]} | {
                name: part[at] for name, part in tonight.taught._asdict().items()
            }
            self.buffer.add(tensors, importance=gain, surprise=gain)

    def _replayed(self, most: int) -> Lessons | None:
        dreamed, parts = round(self.config.dream_frac * most), []
        if dreamed and self.dreams is not None:
            parts.append(self.dreams.draw(dreamed))
        if most > dreamed and len(self.buffer):
            parts.append(_from_items(self.buffer.draw(most - dreamed), self.model.backbone.device))
        return Lessons.joined(parts) if parts else None


def _counters(path: Path, notes: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    day, counters = notes.get("_day"), [notes.get(name) for name in ("num_nights", "num_undone", "_began")]
    if not isinstance(day, list) or any(type(number) is not int or number < 0 for number in [*day, *counters]):
        raise DataError(f"{path}: its counters {counters} or the tokens of its day are damaged")
    return day, [int(counter or 0) for counter in counters]


def _from_items(items: Sequence[Item], device: torch.device) -> Lessons:
    rows = [item.tensors["prompt"] for item in items]
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    taught = Taught(*(torch.stack([item.tensors[name] for item in items]).to(device) for name in Taught._fields))
    gains = torch.tensor([item.importance for item in items], device=device)
    return Lessons(Prompts(ids, lengths), taught, gains)
