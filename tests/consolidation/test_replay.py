"""The replay buffer against a plain list: what is kept, what has to go, what is drawn."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cortex_core.config import ReplayConfig
from cortex_core.consolidation.replay import ReplayBuffer
from cortex_core.errors import ConfigError, DataError

WEIGHT = st.sampled_from([0.0, 0.5, 1.0, 1.0, 2.0, 4.0])


def fact(size: int = 3) -> dict[str, torch.Tensor]:
    return {"token_ids": torch.arange(size)}


def filled(config: ReplayConfig, *importance: float) -> ReplayBuffer:
    buffer = ReplayBuffer(config)
    for number, value in enumerate(importance):
        buffer.add(fact(), {"source": f"s{number}"}, importance=value, surprise=value)
    return buffer


@dataclass
class Kept:
    """A line of the list."""

    number: int
    importance: float
    size: int
    age: int = 0


class AgainstAList(RuleBasedStateMachine):
    """Whatever is done in whatever order, the buffer holds what a list holds that is sorted anew each time."""

    @initialize(items=st.integers(1, 5), budget=st.integers(40, 200), decay=st.sampled_from([0.5, 0.9, 1.0]))
    def start(self, items: int, budget: int, decay: float) -> None:
        config = ReplayConfig(capacity_items=items, capacity_bytes=budget, decay=decay, seed=3)
        self.buffer, self.config, self.kept, self.given = ReplayBuffer(config), config, list[Kept](), 0

    @rule(importance=WEIGHT, size=st.integers(0, 12))
    def add(self, importance: float, size: int) -> None:
        num_bytes = 8 * size + len("{}")
        if num_bytes > self.config.capacity_bytes:
            with pytest.raises(DataError, match="does not fit capacity_bytes"):
                self.buffer.add(fact(size), importance=importance, surprise=1.0)
            return
        number, gone = self.buffer.add(fact(size), importance=importance, surprise=1.0)
        assert number == self.given
        self.given += 1
        self.kept.append(Kept(number, importance, num_bytes))
        expected = []
        while (
            len(self.kept) > self.config.capacity_items or sum(k.size for k in self.kept) > self.config.capacity_bytes
        ):
            worst = sorted(self.kept, key=lambda k: (k.importance * self.config.decay**k.age, -k.age, k.number))[0]
            expected.append(worst.number)
            self.kept.remove(worst)
        assert gone == expected

    @rule()
    def sleep(self) -> None:
        self.buffer.sleep_passed()
        for kept in self.kept:
            kept.age += 1

    @rule(place=st.integers(0, 4))
    def remove(self, place: int) -> None:
        if place < len(self.kept):
            kept = self.kept.pop(place)
            assert self.buffer.remove(kept.number).importance == kept.importance

    @rule(place=st.integers(0, 4), importance=WEIGHT)
    def reweigh(self, place: int, importance: float) -> None:
        if place < len(self.kept):
            self.buffer.reweigh(self.kept[place].number, importance)
            self.kept[place].importance = importance

    @rule(count=st.integers(1, 6))
    def draw(self, count: int) -> None:
        drawn = [item.id for item in self.buffer.draw(count)]
        assert len(drawn) == len(set(drawn)) == min(count, len(self.kept))
        assert set(drawn) <= {kept.number for kept in self.kept}

    @rule()
    def go_on_from_a_checkpoint(self) -> None:
        tensors, table = self.buffer.state()
        again = ReplayBuffer(self.config)
        assert again.restore(tensors, json.loads(json.dumps(table))) == []
        assert [i.id for i in ReplayBuffer.draw(again, 3)] == [i.id for i in self.buffer.draw(3)]
        self.buffer = again

    @invariant()
    def holds_the_same(self) -> None:
        found = [(item.id, item.importance, self.buffer.age(item)) for item in self.buffer.items]
        assert found == [(kept.number, kept.importance, kept.age) for kept in self.kept]
        assert self.buffer.num_bytes == sum(kept.size for kept in self.kept) <= self.config.capacity_bytes
        assert len(self.buffer) <= self.config.capacity_items


AgainstAList.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestAgainstAList = AgainstAList.TestCase


def test_the_least_important_goes_then_the_older_then_the_lower_id() -> None:
    buffer = filled(ReplayConfig(capacity_items=3, decay=0.5), 8.0, 3.0)
    buffer.sleep_passed()
    _, gone = buffer.add(fact(), importance=4.0, surprise=0.0)  # stands at 4 like item 0, which is 8 and one sleep old
    assert gone == []
    assert buffer.add(fact(), importance=9.0, surprise=0.0) == (3, [1])
    assert buffer.add(fact(), importance=9.0, surprise=0.0) == (4, [0])  # the older of two equals
    assert buffer.add(fact(), importance=1.0, surprise=0.0) == (5, [5])  # the new one itself
    assert buffer.add(fact(), importance=9.0, surprise=0.0) == (6, [2])
    assert buffer.add(fact(), importance=9.0, surprise=0.0) == (7, [3])  # of equals of one age the lower id


def test_entering_does_not_age() -> None:
    buffer = filled(ReplayConfig(decay=0.5), 1.0)
    assert buffer.standing(buffer[0]) == (1.0, 0, 0)
    buffer.sleep_passed()
    buffer.add(fact(), importance=1.0, surprise=1.0)
    assert [buffer.standing(item)[0] for item in buffer.items] == [0.5, 1.0]
    assert 1 in buffer and 2 not in buffer


def test_more_than_fits_makes_room_for_itself_by_bytes() -> None:
    config = ReplayConfig(capacity_bytes=100)
    buffer = ReplayBuffer(config)
    for importance in (1.0, 2.0, 3.0):
        buffer.add(fact(3), importance=importance, surprise=1.0)  # 26 bytes each
    assert buffer.add(fact(8), importance=5.0, surprise=1.0) == (3, [0, 1])
    assert buffer.num_bytes == 26 + 66


def test_what_is_kept_is_a_copy() -> None:
    given = {"token_ids": torch.arange(3)}
    buffer = ReplayBuffer(ReplayConfig())
    buffer.add(given, importance=1.0, surprise=1.0)
    given["token_ids"] += 5
    assert buffer[0].tensors["token_ids"].tolist() == [0, 1, 2]


def drawn_first(buffer: ReplayBuffer, times: int) -> dict[int, float]:
    counts = Counter(buffer.draw(1)[0].id for _ in range(times))
    return {item.id: counts[item.id] / times for item in buffer.items}


def test_draws_follow_surprise_and_age_as_documented() -> None:
    buffer = filled(ReplayConfig(surprise_power=2.0, draw_decay=0.5), 1.0, 2.0)
    buffer.sleep_passed()
    buffer.add(fact(), importance=0.0, surprise=1.0)
    expected = {0: 0.5 / 3.5, 1: 2.0 / 3.5, 2: 1.0 / 3.5}
    assert buffer.probabilities() == pytest.approx(expected)
    times = 4000
    for number, share in drawn_first(buffer, times).items():
        assert abs(share - expected[number]) < 5 * math.sqrt(expected[number] * (1 - expected[number]) / times)


def test_the_rest_of_a_draw_is_one_after_the_other_without_putting_back() -> None:
    """P(1 then 2) = p1 · p2 / (1 − p1), which no independent draw of pairs has."""
    buffer = filled(ReplayConfig(), 1.0, 4.0, 5.0)
    p, times = buffer.probabilities(), 4000
    pairs = Counter(tuple(item.id for item in buffer.draw(2)) for _ in range(times))
    for first in p:
        for second in p:
            expected = p[first] * p[second] / (1 - p[first]) if first != second else 0.0
            assert abs(pairs[first, second] / times - expected) <= 5 * math.sqrt(expected * (1 - expected) / times)


def test_nothing_is_too_dull_or_too_old_to_be_drawn() -> None:
    buffer = filled(ReplayConfig(draw_decay=0.1, surprise_power=8.0), 0.0, 0.0)
    for _ in range(2000):  # 0.1 ** 2000 is 0 in floating point
        buffer.sleep_passed()
    assert buffer.probabilities() == pytest.approx({0: 0.5, 1: 0.5})
    assert sorted(item.id for item in buffer.draw(9)) == [0, 1]
    assert ReplayBuffer(ReplayConfig()).draw(3) == [] and ReplayBuffer(ReplayConfig()).probabilities() == {}


def test_draws_are_seeded() -> None:
    def ids(seed: int) -> list[list[int]]:
        buffer = filled(ReplayConfig(seed=seed), *[1.0] * 20)
        return [[item.id for item in buffer.draw(5)] for _ in range(3)]

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)
    assert len({tuple(draw) for draw in ids(1)}) == 3


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"importance": -1.0}, r"importance = -1\.0: must be finite and at least 0"),
        ({"importance": math.nan}, "importance = nan"),
        ({"surprise": math.inf}, "surprise = inf"),
        ({"tensors": {"h": torch.tensor([1.0, math.nan])}}, "h holds numbers that are not finite"),
        ({"notes": {"loss": math.nan}}, "note 'loss' = nan"),
        ({"tensors": {"h": torch.zeros(99)}}, r"398 bytes does not fit capacity_bytes = 200"),
    ],
)
def test_bad_items_are_refused_and_change_nothing(numbers: dict, message: str) -> None:
    buffer = filled(ReplayConfig(capacity_bytes=200), 1.0)
    before = buffer.state()[1]
    given = {"tensors": fact(), "importance": 1.0, "surprise": 1.0} | numbers
    with pytest.raises(DataError, match=message):
        buffer.add(given.pop("tensors"), given.pop("notes", None), **given)
    assert buffer.state()[1] == before


def test_wrong_requests() -> None:
    buffer = filled(ReplayConfig(), 1.0)
    with pytest.raises(ConfigError, match="count = 0: draw at least 1"):
        buffer.draw(0)
    with pytest.raises(DataError, match="importance = -2"):
        buffer.reweigh(0, -2.0)
    with pytest.raises(KeyError):
        buffer.remove(7)
    assert buffer[0].importance == 1.0
