"""What waits for sleep: a bounded store of items, from which the least important go first. It owns its items.

What has to go, and in which order, is a total order and depends on nothing but importance, age and id. An item is not
aged by entering, only by a sleep that it was there for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cortex_core import files
from cortex_core.config import ReplayConfig
from cortex_core.errors import ConfigError, DataError

SCHEMA = "cortex-replay/1"
LEAST_SURPRISE = 1e-6
"""Draws count no item as less surprising: everything that is kept can be drawn."""
Notes = Mapping[str, str | int | float]
_NUMBERS = {"id": int, "importance": float, "surprise": float, "born": int}


@dataclass(frozen=True)
class Item:
    """One thing to be replayed."""

    id: int
    """Counts up from 0 over the life of a buffer; never given twice."""
    importance: float
    """At least 0: what it is kept for."""
    surprise: float
    """At least 0: what it is drawn for."""
    born: int
    """Sleeps of the buffer before it came."""
    tensors: Mapping[str, Tensor]
    """On the CPU."""
    notes: Notes

    @property
    def num_bytes(self) -> int:
        """What counts against `capacity_bytes`: its tensors, and its notes as JSON."""
        tensors = sum(part.numel() * part.element_size() for part in self.tensors.values())
        return tensors + len(json.dumps(dict(self.notes)))


class ReplayBuffer:
    """At most so many items and bytes. `state` and `restore` are for checkpoints, `save` and `load` for files."""

    def __init__(self, config: ReplayConfig) -> None:
        self.config = config
        self.num_sleeps = 0
        """How often `sleep_passed` was called."""
        self._items: dict[int, Item] = {}
        self._next_id = 0
        self._num_draws = 0
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, number: int) -> bool:
        return number in self._items

    def __getitem__(self, number: int) -> Item:
        return self._items[number]

    @property
    def items(self) -> list[Item]:
        """All items, by id: the oldest first."""
        return list(self._items.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all items."""
        return self._num_bytes

    def age(self, item: Item) -> int:
        """Sleeps that it was there for."""
        return self.num_sleeps - item.born

    def standing(self, item: Item) -> tuple[float, int, int]:
        """What goes first has the smallest: importance · decay^age; of equals the older; of these the lower id."""
        age = self.age(item)
        return item.importance * self.config.decay**age, -age, item.id

    def add(
        self, tensors: Mapping[str, Tensor], notes: Notes | None = None, *, importance: float, surprise: float
    ) -> tuple[int, list[int]]:
        """Keep a copy. Returns its id and those of the items that had to go, in order; the new one may be among them.

        Raises DataError, and changes nothing, for numbers that are negative or not finite or an item that is too large.
        """
        copies = {name: part.detach().cpu().contiguous().clone() for name, part in tensors.items()}
        item = Item(self._next_id, float(importance), float(surprise), self.num_sleeps, copies, dict(notes or {}))
        _check(item)
        if item.num_bytes > self.config.capacity_bytes:
            raise DataError(
                f"an item of {item.num_bytes} bytes does not fit capacity_bytes = {self.config.capacity_bytes}; "
                "raise it, or keep shorter segments"
            )
        self._next_id += 1
        self._items[item.id] = item
        self._num_bytes += item.num_bytes
        return item.id, self._evict()

    def _evict(self) -> list[int]:
        gone = []
        limits = self.config
        while len(self._items) > limits.capacity_items or self._num_bytes > limits.capacity_bytes:
            gone.append(min(self._items.values(), key=self.standing).id)
            self.remove(gone[-1])
        return gone

    def remove(self, number: int) -> Item:
        """Take an item out. Raises KeyError for one that is not there."""
        item = self._items.pop(number)
        self._num_bytes -= item.num_bytes
        return item

    def reweigh(self, number: int, importance: float) -> None:
        """Give an item another importance; its age stays. Raises KeyError for one that is not there."""
        item = replace(self._items[number], importance=float(importance))
        _check(item)
        self._items[number] = item

    def sleep_passed(self) -> None:
        """Everything that is here is one sleep older."""
        self.num_sleeps += 1

    def probabilities(self) -> dict[int, float]:
        """Of each item, by id, to be the first of a draw: ∝ max(surprise, 1e-6)^surprise_power · draw_decay^age."""
        weights = self._log_weights()
        shares = np.exp(weights - weights.max()) if len(weights) else weights
        return dict(zip(self._items, (shares / shares.sum()).tolist(), strict=True))

    def draw(self, count: int) -> list[Item]:
        """Up to `count` different items, in the order in which they were drawn, without putting back.

        Raises ConfigError for less than one.
        """
        if count < 1:
            raise ConfigError(f"count = {count}: draw at least 1 item")
        # SeedSequence mixes all bits: neighbouring draws have nothing in common.
        random = np.random.default_rng((self.config.seed, self._num_draws))
        self._num_draws += 1
        # Of exponential clocks, that of rate w rings first with probability w / sum. In logarithms, as w may be tiny.
        rings = np.log(random.standard_exponential(len(self._items))) - self._log_weights()
        items = self.items
        return [items[place] for place in np.argsort(rings, kind="stable")[:count]]

    def _log_weights(self) -> np.ndarray:
        power, fading = self.config.surprise_power, math.log(self.config.draw_decay)
        surprises = (math.log(max(item.surprise, LEAST_SURPRISE)) for item in self._items.values())
        ages = (self.age(item) for item in self._items.values())
        return np.array([power * s + fading * age for s, age in zip(surprises, ages, strict=True)])

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything but the settings, as tensors and a table that JSON can hold."""
        tensors = {f"{item.id}.{name}": part for item in self.items for name, part in item.tensors.items()}
        table = [{name: getattr(item, name) for name in _NUMBERS} | {"notes": dict(item.notes)} for item in self.items]
        counters = {"num_sleeps": self.num_sleeps, "next_id": self._next_id, "num_draws": self._num_draws}
        return tensors, counters | {"items": table}

    def restore(self, tensors: Mapping[str, Tensor], table: Mapping[str, Any]) -> list[int]:
        """Be as `state` says. Returns what had to go as the capacity is smaller now. Raises DataError, unchanged."""
        found = ReplayBuffer(self.config)
        try:
            found.num_sleeps, found._next_id, found._num_draws = _counters(table)
            for item in _items(tensors, table["items"]):
                in_order = item.id > max(found._items, default=-1) and item.id < found._next_id
                if not in_order or not 0 <= item.born <= found.num_sleeps:
                    raise ValueError(f"item {item.id} has no place in it")
                _check(item)
                found._items[item.id] = item
                found._num_bytes += item.num_bytes
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"replay buffer: its state is damaged ({type(error).__name__}: {error})") from error
        gone = found._evict()
        self.__dict__.update(found.__dict__)
        return gone

    def save(self, path: str | Path) -> None:
        """Write one file; the one that is there is replaced only once the new one is whole."""
        files.write(Path(path), SCHEMA, *self.state())

    @classmethod
    def load(cls, path: str | Path, config: ReplayConfig) -> ReplayBuffer:
        """Go on from `save`. Raises DataError: missing, truncated, malformed."""
        tensors, table = files.read(Path(path), SCHEMA, "replay buffer")
        buffer = cls(config)
        try:
            buffer.restore(tensors, table)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        return buffer


def _check(item: Item) -> None:
    for name in ("importance", "surprise"):
        if not (math.isfinite(value := getattr(item, name)) and value >= 0):
            raise DataError(f"{name} = {value}: must be finite and at least 0")
    for name, part in item.tensors.items():
        if not bool(torch.isfinite(part).all()):
            raise DataError(f"{name} holds numbers that are not finite: nothing is learned from them; leave it out")
    for name, value in item.notes.items():
        if not isinstance(value, str) and not math.isfinite(value):
            raise DataError(f"note {name!r} = {value}: must be text or a finite number")


def _counters(table: Mapping[str, Any]) -> Sequence[int]:
    counters = [table[name] for name in ("num_sleeps", "next_id", "num_draws")]
    if any(type(counter) is not int or counter < 0 for counter in counters):
        raise ValueError(f"its counters are {counters}")
    return counters


def _items(tensors: Mapping[str, Tensor], table: Any) -> list[Item]:
    by_item: dict[str, dict[str, Tensor]] = {}
    for name, part in tensors.items():
        number, _, rest = name.partition(".")
        by_item.setdefault(number, {})[rest] = part
    items = []
    for row in table:
        wrong = [name for name, kind in _NUMBERS.items() if type(row[name]) is not kind]
        if wrong:
            raise ValueError(f"{wrong[0]} of an item is {row[wrong[0]]!r}")
        parts = by_item.pop(str(row["id"]), {})
        items.append(Item(**{name: row[name] for name in _NUMBERS}, tensors=parts, notes=dict(row["notes"])))
    if by_item:
        raise ValueError(f"tensors of item {next(iter(by_item))}, which is not in its table")
    return items
