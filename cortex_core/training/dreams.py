"""Dreams as old lessons: what earlier days have written is dreamed of, judged, and learned again, where it passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from cortex_core import files
from cortex_core.backbone.model import Cortex
from cortex_core.backbone.prompts import Prompts
from cortex_core.backbone.session import Session
from cortex_core.config import DreamConfig, SleepConfig
from cortex_core.consolidation.lessons import Lessons, Taught
from cortex_core.dreaming import provenance
from cortex_core.dreaming.dream import Dream, Dreamer
from cortex_core.dreaming.graph import MemoryGraph
from cortex_core.dreaming.judge import Verdict, judge
from cortex_core.dreaming.memories import written
from cortex_core.dreaming.ngrams import NgramSet
from cortex_core.errors import DataError

SCHEMA = "cortex-dreams/1"
MEMORIES, DREAMED = "memories.safetensors", "dreamed.safetensors"
_COUNTERS = ("_next_ticket", "_next_memory", "_num_days", "_num_nights", "_num_draws")


class Dreams:
    """The dreams of one reader. What it keeps of a day is what was written, never what was answered.

    Filtered behavioural cloning: the model's own answers, where the judge lets them pass, are what it learns to give.
    """

    def __init__(self, model: Cortex, config: DreamConfig, sleep: SleepConfig, question: Sequence[int]) -> None:
        """`question`: token ids that stand before a cue."""
        self.model, self.config = model, config
        self.graph = MemoryGraph.of((), config.graph)
        self.table: list[tuple[Dream, Verdict]] = []
        """Tonight's dreams, kept or not."""
        self.packed_rows = b""
        """Those of all nights, as `provenance.packed`, with the number of the `night`."""
        self._question, self._top = tuple(question), sleep.top_tokens
        self._per_night, self._min_write = sleep.dreams_per_night, sleep.min_write
        self._earlier = NgramSet.empty(config.judge.ngram_tokens, config.judge.set_bits)
        self._next_ticket = self._next_memory = self._num_days = self._num_nights = self._num_draws = 0
        self._kept = Lessons.none(self._top)

    def dream(self) -> dict[str, float]:
        """Dream of what was written on earlier days, with empty fast weights; replaces last night's dreams."""
        self._num_nights += 1
        self._kept, self.table = Lessons.none(self._top), []
        if not len(self.graph):
            return {"dream/num": 0.0}
        dreams = self.made(self._per_night)
        verdicts, self._earlier = judge(dreams, self.graph.record, self.config.judge, earlier=self._earlier)
        self.table = list(zip(dreams, verdicts, strict=True))
        rows = (provenance.row(*judged) | {"night": self._num_nights} for judged in self.table)
        self.packed_rows += provenance.packed(rows)
        self.graph = self.graph.after(dream.memories for dream in dreams)
        kept = [dream for dream, verdict in self.table if verdict.passed]
        if kept:
            answers = torch.tensor([dream.answer.tokens[0] for dream in kept])
            vocab_size = self.model.backbone.config.get_text_config().vocab_size
            taught = Taught.answered(answers, self._top, vocab_size)
            self._kept = Lessons(Prompts.of([dream.prompt for dream in kept]), taught, torch.zeros(len(kept)))
        return {"dream/num": float(len(dreams)), "dream/accept_frac": len(kept) / len(dreams)}

    def made(self, number: int) -> list[Dream]:
        """So many new dreams of the graph. To be overridden where they are made elsewhere."""
        tickets = range(self._next_ticket, self._next_ticket + number)
        self._next_ticket = tickets.stop
        return Dreamer(self.model, self.graph, self.config, model_version=str(self._num_nights)).dream(tickets)

    def draw(self, most: int) -> Lessons:
        """Up to so many of tonight's dreams that passed, without putting back."""
        random = np.random.default_rng((self.config.seed, self._num_nights, self._num_draws))
        self._num_draws += 1
        return self._kept.at(torch.from_numpy(random.permutation(len(self._kept))[:most]))

    def remember(self, session: Session, day: Sequence[int], began: int) -> None:
        """Take what a day has written into the graph: tokens of the day, the first at position `began`."""
        new = written(
            session, day, began, self._question, min_write=self._min_write, segment=self._num_days,
            next_id=self._next_memory,
        )  # fmt: skip
        self._next_memory += len(new)
        self._num_days += 1
        self.graph = self.graph.with_memories(new)

    def save(self, folder: str | Path) -> None:
        """Write the memories and what was dreamed before into a folder; not tonight's lessons, which a night makes."""
        folder = Path(folder)
        self.graph.save(folder / MEMORIES)
        notes = {name: getattr(self, name) for name in _COUNTERS}
        tensors = {"earlier": self._earlier.bits, "rows": np.frombuffer(self.packed_rows, np.uint8).copy()}
        files.write(folder / DREAMED, SCHEMA, {name: torch.from_numpy(value) for name, value in tensors.items()}, notes)

    def load(self, folder: str | Path) -> None:
        """Go on from `save`, under the same settings. Raises DataError."""
        folder = Path(folder)
        found, notes = files.read(folder / DREAMED, SCHEMA, "dreams")
        bits = found.get("earlier", torch.zeros(0)).numpy()
        counters = [notes.get(name) for name in _COUNTERS]
        if bits.shape != self._earlier.bits.shape or bits.dtype != self._earlier.bits.dtype:
            raise DataError(f"{folder / DREAMED}: was written under another judge.set_bits, or is damaged")
        if any(type(counter) is not int or counter < 0 for counter in counters):
            raise DataError(f"{folder / DREAMED}: its counters {counters} are damaged")
        self.graph, self.packed_rows = MemoryGraph.load(folder / MEMORIES), _packed(found)
        self._earlier = replace(self._earlier, bits=bits)
        for name, counter in zip(_COUNTERS, counters, strict=True):
            setattr(self, name, counter)

    def kept(self) -> Iterator[Dream]:
        """Tonight's dreams that passed."""
        return (dream for dream, verdict in self.table if verdict.passed)


def dreamed_in(folder: str | Path) -> list[provenance.Row]:
    """Every dream of a life that was saved into a folder, with the number of its `night`. Raises DataError."""
    return provenance.unpacked(_packed(files.read(Path(folder) / DREAMED, SCHEMA, "dreams")[0]))


def _packed(found: Mapping[str, torch.Tensor]) -> bytes:
    return found.get("rows", torch.zeros(0, dtype=torch.uint8)).numpy().tobytes()
