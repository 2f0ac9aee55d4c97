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
from cortex_core.config import FisherConfig, ReplayConfig, ScalingConfig, SleepConfig
from cortex_core.consolidation import sleep
from cortex_core.consolidation.elastic import ElasticWeights
from cortex_core.consolidation.guard import DriftGuard
from cortex_core.consolidation.lessons import Lessons, cues, lessons, lessons_of_text, questions
from cortex_core.consolidation.night_codes import NightCodes
from cortex_core.consolidation.old_lessons import keep, lessons_of
from cortex_core.consolidation.replay import ReplayBuffer
from cortex_core.consolidation.spread import fitted, spread_addresses, unfitted
from cortex_core.errors import ConfigError, DataError, IncompatibleError

SCHEMA = "cortex-sleeper/1"
SESSION, REPLAY, SLOW = "session.safetensors", "replay.safetensors", "slow.safetensors"
LOG_WRITES = 4096
"""Writes of a day that can give a question; it sleeps before there are as many, whatever was agreed."""
READ_TOKENS = 16
"""Tokens of text behind which a written one is learned, where nobody answers questions."""

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
        mixed_text: Tensor | None = None,
        fisher: FisherConfig | None = None,
        scaling: ScalingConfig | None = None,
        codes: NightCodes | None = None,
        after_backward: Callable[[], None] = lambda: None,
    ) -> None:
        """`encode` is for the words of the questions; `dreams` for `sleep.dream_frac`; `mixed_text` [windows, width]
        for `sleep.mixed_text_weight`; `after_backward` is called where shards are to be let go. Without a `guard` every
        night counts; without `fisher`, `scaling` and `codes` nothing is held, scaled or coded. Raises ConfigError for a
        memory that cannot have slow weights."""
        self.model, self.config = model, config or SleepConfig()
        self.encode = encode
        self._questions = [tuple(encode(text)) if text else () for text in self.config.questions]
        self._grow()
        self.buffer = ReplayBuffer(replay or ReplayConfig())
        self.session = model.new_session(log_writes=LOG_WRITES)
        self.guard, self.dreams, self._after_backward = guard, dreams, after_backward
        if self.config.dream_frac and dreams is None:
            raise ConfigError(f"dream_frac = {self.config.dream_frac}: needs `dreams`; give them, or set it to 0")
        self._mixed_text = mixed_text
        if self.config.mixed_text_weight and (mixed_text is None or not len(mixed_text)):
            raise ConfigError(
                f"mixed_text_weight = {self.config.mixed_text_weight}: needs `mixed_text`; give some, or set it to 0"
            )
        holds = fisher is not None and fisher.weight > 0
        self.elastic = ElasticWeights(model, fisher, after_backward) if fisher is not None and holds else None
        self._scaling, self.codes = scaling, codes
        self.num_nights = self.num_undone = 0
        self._day: list[int] = []
        self._began = 0  # position of the first token of `_day`

    def _grow(self) -> None:
        """Make room for what nights will learn, unless there is; as much as the settings say."""
        new = not self.model.fast_weights.slow_slots
        self.model.grow_slow_weights(self.config.slots, self.config.active)
        if new:
            spread_addresses(self.model, self._questions)

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
        evening, metrics = self.evening()
        kept = True
        if len(evening.tonight):
            learned, kept = self.learn(evening)
            metrics |= learned
        self.morning(evening, kept)
        return Slept(metrics | {"sleep/undone": float(not kept)}, kept)

    def evening(self) -> tuple[sleep.Evening, dict[str, float]]:
        """End the day: what there is to learn from it, among what; then its fast weights are wiped. Also metrics."""
        tonight = self.lessons()
        metrics = {"sleep/lessons": float(len(tonight)), "sleep/buffer_items": float(len(self.buffer))}
        if self.dreams is not None and self.config.dream_frac:
            metrics |= self.dreams.dream()
        if self.codes is not None:
            metrics |= self.codes.night(self._day, self.config.steps)
        steps = self.config.steps if len(tonight) else 0
        replayed = [self._replayed(self.config.replayed) for _ in range(steps)]
        if self.dreams is not None:
            self.dreams.remember(self.session, self._day, self._began)
        self.session.wipe()
        position = int(self.session.start_tokens[0])
        self._day, self._began = self._day[position - self._began :], position
        held = self.elastic.held() if self.elastic is not None else None
        return sleep.Evening(tonight, replayed, self._text_of(steps), held), metrics

    def learn(self, evening: sleep.Evening) -> Slept:
        """Teach the slow weights tonight's lessons, among old ones. To be overridden by readers that learn in another
        way."""
        night = sleep.consolidate(self.model, evening, self.config, self._after_backward, self._scaling)
        metrics = dict(night.metrics)
        return Slept(metrics, self._merge(night, metrics))

    def morning(self, evening: sleep.Evening, kept: bool) -> None:
        """What was learned is an old lesson from here on, if it was `kept`."""
        if kept and self.config.dream_frac < 1:
            keep(self.buffer, evening.tonight)
        if kept and self.elastic is not None:
            self.elastic.learned(evening.tonight)
        self.buffer.sleep_passed()
        self.num_nights += 1
        self.num_undone += not kept

    def lessons(self) -> Lessons:
        """What there is to learn tonight, most of it first."""
        config = self.config
        if config.teacher:
            asked = questions(self._questions, self._cues(), self._day, config.lead_tokens, self.num_nights)
            found = lessons(self.model, self.session, Prompts.of(asked), config.top_tokens, config.batch_size)
        else:
            found = lessons_of_text(self.model, self._read_by_day(), config.top_tokens, config.batch_size)
        order = found.gain_nats.argsort(descending=True, stable=True)
        worth = order[found.gain_nats[order] >= config.min_gain_nats]
        return found.at(worth[: config.max_lessons])

    def _cues(self) -> list[list[int]]:
        return cues(self._day, self._began, self._written(), self.config.cue_tokens)

    def _written(self) -> list[int]:
        return [write.position for write in self.session.writes() if write.strength >= self.config.min_write]

    def _read_by_day(self) -> dict[tuple[int, ...], int]:
        """Tokens that were written, each behind the text before it and behind each question about its cue."""
        day, rows = self._day, dict[tuple[int, ...], int]()
        for at in sorted({position - self._began for position in self._written()}):
            if at >= self.config.cue_tokens:
                cue = day[at - self.config.cue_tokens : at]
                behind = [tuple(day[max(0, at - READ_TOKENS) : at]), *((*words, *cue) for words in self._questions)]
                rows |= dict.fromkeys(behind, day[at])
        return rows

    def _text_of(self, steps: int) -> Tensor | None:
        """For each step of the coming night [steps, windows, width], drawn anew, as the number of the night says."""
        if self._mixed_text is None or not self.config.mixed_text_weight or not steps:
            return None
        drawn = torch.Generator().manual_seed(self.num_nights)
        shape = (steps, self.config.mixed_text_windows)
        return self._mixed_text[torch.randint(len(self._mixed_text), shape, generator=drawn)]

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

    def values(self) -> dict[str, Tensor]:
        """What nights change, by name."""
        return sleep.slow_values(self.model)

    def save(self, folder: str | Path) -> None:
        """Write everything but the sidecars and the settings into a folder, the file that `load` needs first last."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.session.save(folder / SESSION)
        self.buffer.save(folder / REPLAY)
        if self.dreams is not None:
            self.dreams.save(folder)
        for part in (self.elastic, self.codes):
            if part is not None:
                part.save(folder)
        notes = {name: getattr(self, name) for name in ("num_nights", "num_undone", "_began", "_day")}
        files.write(folder / SLOW, SCHEMA, {**sleep.slow_values(self.model), **fitted(self.model)}, notes)

    def load(self, folder: str | Path) -> None:
        """Go on from `save`, with the same sidecars and settings. Raises DataError (missing, damaged),
        IncompatibleError (of another model)."""
        folder = Path(folder)
        found, notes = files.read(folder / SLOW, SCHEMA, "slow weights")
        session = self.model.load_session(folder / SESSION, self.session)
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
        for part in (self.elastic, self.codes):
            if part is not None:
                part.load(folder)
        for name, value in values.items():
            value.data.copy_(found[name])
        self.session, self.buffer, self._day = session, buffer, day
        self.num_nights, self.num_undone, self._began = counters

    def _replayed(self, most: int) -> Lessons:
        dreamed, parts = round(self.config.dream_frac * most), []
        if dreamed and self.dreams is not None:
            parts.append(self.dreams.draw(dreamed))
        if most > dreamed and len(self.buffer):
            parts.append(lessons_of(self.buffer.draw(most - dreamed), self.model.backbone.device))
        return Lessons.joined(parts) if parts else Lessons.none(self.config.top_tokens)


def _counters(path: Path, notes: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    day, counters = notes.get("_day"), [notes.get(name) for name in ("num_nights", "num_undone", "_began")]
    if not isinstance(day, list) or any(type(number) is not int or number < 0 for number in [*day, *counters]):
        raise DataError(f"{path}: its counters {counters} or the tokens of its day are damaged")
    return day, [int(counter or 0) for counter in counters]
