"""The graph of memories: a value of bounded size, on which walks begin and from which dreams are made."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from cortex_core import files
from cortex_core.config import MemoryGraphConfig
from cortex_core.dreaming.links import FloatArray, IntArray, Links, links
from cortex_core.dreaming.memories import Memory, Tokens, addresses, checked
from cortex_core.dreaming.walks import Steps, walks
from cortex_core.errors import DataError

SCHEMA = "cortex-memory-graph/1"
Pair = tuple[int, int]
"""Ids of two memories, the lower first."""
_WALKS = 31  # keeps the draws of walks apart from a ticket's other draws
_NUMBERS = ("id", "position", "segment", "importance")
_TOKENS = ("tokens", "cue", "answer", "context")


@dataclass(frozen=True, eq=False)
class MemoryGraph:
    """Memories and what links them. Make it with `of`; places below are places in `memories`."""

    config: MemoryGraphConfig
    memories: tuple[Memory, ...]
    """By id."""
    met: Mapping[Pair, int] = field(default_factory=dict)
    """How often two memories have been in one dream, the pair that first met longest ago first."""

    @classmethod
    def of(cls, memories: Iterable[Memory], config: MemoryGraphConfig | None = None) -> MemoryGraph:
        """A graph of these. Of too many, those go first that a newer one with the same cue has replaced, or else the
        record would go back to what held before; then the least important; of equals the older. Raises DataError."""
        config = config or MemoryGraphConfig()
        kept = checked(memories)
        if len(kept) > config.max_memories:
            newest = {memory.cue: memory.id for memory in sorted(kept, key=_age)}
            kept = sorted(kept, key=lambda m: (newest[m.cue] == m.id, m.importance, m.id))[-config.max_memories :]
        return cls(config, checked(kept))

    def with_memories(self, new: Iterable[Memory]) -> MemoryGraph:
        """These as well; the least important go. Raises DataError."""
        grown = MemoryGraph.of((*self.memories, *new), self.config)
        met = {pair: count for pair, count in self.met.items() if grown.places.keys() >= set(pair)}
        return replace(grown, met=met)

    def after(self, dreams: Iterable[Sequence[int]]) -> MemoryGraph:
        """The graph that remembers which memories were in one dream: ids, dream by dream."""
        met = dict(self.met)
        for ids in dreams:
            for pair in combinations(sorted(set(ids)), 2):
                met[pair] = met.get(pair, 0) + 1
        latest = list(met.items())[-self.config.max_pairs :]
        return replace(self, met=dict(latest))

    def __len__(self) -> int:
        return len(self.memories)

    @cached_property
    def places(self) -> Mapping[int, int]:
        """Place of each memory by its id."""
        return {memory.id: place for place, memory in enumerate(self.memories)}

    @cached_property
    def record(self) -> Mapping[Tokens, Tokens]:
        """What is to be answered to each cue: of the memories that share one, the newest has it."""
        return {memory.cue: memory.answer for memory in sorted(self.memories, key=_age)}

    @cached_property
    def links(self) -> Links:
        """All links, by places."""
        return links(addresses(self.memories).numpy(), self._numbers("position"), self._numbers("segment"), self.config)

    @cached_property
    def _shares(self) -> dict[Pair, float]:
        weights = self.links.weight
        return dict(
            zip(map(tuple, self.links.ends.tolist()), (weights / weights.max(initial=0.0)).tolist(), strict=True)
        )

    @cached_property
    def _steps(self) -> Steps:
        return Steps.along(self.links.ends, self.links.weight, len(self))

    def among(self, places: Sequence[int]) -> tuple[FloatArray, IntArray]:
        """Of each two of some places, the weight of their link as a share of the strongest in the graph (0: not
        linked), and how many dreams they have met in. Both [places, places], 0 for a place with itself."""
        shares, met = np.zeros((len(places), len(places))), np.zeros((len(places), len(places)), dtype=np.int64)
        for one, other in combinations(range(len(places)), 2):
            low, high = sorted((places[one], places[other]))
            shares[one, other] = shares[other, one] = self._shares.get((low, high), 0.0)
            # Ids rise with places, so the lower id comes first here as well.
            met[one, other] = met[other, one] = self.met.get((self.memories[low].id, self.memories[high].id), 0)
        return shares, met

    def walks(self, tickets: Sequence[int], seed: int) -> IntArray:
        """Places on the walk of each ticket: [tickets, walk_steps + 1]. A walk begins at a memory in proportion to its
        importance, and depends on graph, ticket and seed alone. Raises DataError for an empty graph."""
        if not len(self):
            raise DataError("the memory graph holds no memory: nothing was written, or nothing strongly enough")
        draws = np.stack(
            [np.random.default_rng((seed, ticket, _WALKS)).random(1 + 2 * self.config.walk_steps) for ticket in tickets]
        )
        weights = np.array([memory.importance for memory in self.memories])
        running = np.cumsum(weights if weights.sum() > 0 else np.ones(len(self)))
        starts = np.searchsorted(running, draws[:, 0] * running[-1], side="right").clip(max=len(self) - 1)
        return walks(self._steps, starts, draws[:, 1:].reshape(len(draws), -1, 2), self.config.restart)

    def _numbers(self, name: str) -> IntArray:
        return np.array([getattr(memory, name) for memory in self.memories], dtype=np.int64)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file with a table as JSON; one that is there is replaced once the new one is whole."""
        rows = [
            {name: getattr(memory, name) for name in _NUMBERS} | {name: list(getattr(memory, name)) for name in _TOKENS}
            for memory in self.memories
        ]
        notes = {
            "config": self.config.model_dump(mode="json"),
            "memories": rows,
            "met": [[*pair, count] for pair, count in self.met.items()],
        }
        files.write(Path(path), SCHEMA, {"addresses": addresses(self.memories)}, notes)

    @classmethod
    def load(cls, path: str | Path) -> MemoryGraph:
        """What `save` has written. Raises DataError: missing, truncated, malformed."""
        tensors, notes = files.read(Path(path), SCHEMA, "memory graph")
        try:
            table = tensors["addresses"].float().numpy()
            config = MemoryGraphConfig.model_validate_json(json.dumps(notes["config"]))
            memories = [_memory(row, address) for row, address in zip(notes["memories"], table, strict=True)]
            graph = cls.of(memories, config)
            met = {_pair(one, other, graph): _count(count) for one, other, count in notes["met"]}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            said = " ".join(str(error).split())
            raise DataError(f"memory graph {path}: it is damaged ({type(error).__name__}: {said})") from error
        return replace(graph, met=met)


def _age(memory: Memory) -> tuple[int, int]:
    return memory.position, memory.id


def _memory(row: Mapping[str, Any], address: np.ndarray) -> Memory:
    fields: dict[str, Any] = {name: row[name] for name in _NUMBERS} | {name: tuple(row[name]) for name in _TOKENS}
    whole = [fields[name] for name in _NUMBERS if name != "importance"] + [t for name in _TOKENS for t in fields[name]]
    if any(type(value) is not int or value < 0 for value in whole):
        raise ValueError(f"memory {row['id']!r} holds what is not a whole number from 0 on")
    return Memory(**fields, address=np.array(address))


def _pair(one: int, other: int, graph: MemoryGraph) -> Pair:
    if not one < other or not graph.places.keys() >= {one, other}:
        raise ValueError(f"{one} and {other} cannot have met")
    return one, other


def _count(count: int) -> int:
    if type(count) is not int or count < 1:
        raise ValueError(f"two memories have met {count!r} times")
    return count
