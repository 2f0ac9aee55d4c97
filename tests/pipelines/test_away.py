"""Nights that are slept elsewhere and dreams that others dream: what comes of them is what one process makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cortex_core import files
from cortex_core.backbone.model import Cortex
from cortex_core.backbone.prompts import Prompts
from cortex_core.consolidation.lessons import Lessons
from cortex_core.consolidation.sleeper import Slept
from cortex_core.errors import DataError
from cortex_core.training.dreams import Dreams
from pipelines.away import AWAY, SCHEMA, AwaySleeper, PooledDreams
from pipelines.duties import Consolidating
from pipelines.nights import Nights
from pipelines.slow_actor import consolidator
from tests import tiny
from tests.consolidation import sleepers
from tests.consolidation.sleepers import DAY, right
from tests.pipelines.beside_scenes import Stage
from tests.pipelines.living_scenes import Two, away, life, local_nights, local_pool, plain, run_config, shift, slow

QUICK = {"sleep__steps": 2}
NEVER = -1.0
"""Nats that no night may move text by: a guard that refuses all of them."""


def on_stage(**changes: Any) -> tuple[AwaySleeper, Nights, Stage]:
    """A reader whose nights are slept when the test says so."""
    config = run_config(sleep_actor__synchronous=False, **changes)
    stage = Stage(lambda: Consolidating(consolidator(config)))
    nights = Nights(stage.crew(1, config.sleep_actor, "sleeper"), config.sleep_actor, clock=stage.clock)
    return away(config, nights), nights, stage


def days(reader: Any, change: bool = False) -> list[Slept]:
    """Read three days; training changes the sidecars after each if asked to."""
    tokens, nights = sleepers.stream(), []
    for day in range(3):
        nights += reader.read(tokens[day * DAY + bool(day) : (day + 1) * DAY + 1])
        if change:
            shift(reader)
    return nights


def test_synchronous_nights_are_those_of_a_sleeper_to_the_bit() -> None:
    """Also while the sidecars are trained: a night begins with them as they are."""
    config = run_config()
    one, other = plain(config), away(config, local_nights(config))
    found, expected = days(other, change=True), days(one, change=True)
    assert [night.kept for night in found] == [True] * 3 and other.num_away == 0 and other.version == 3
    assert tiny.same(slow(one), slow(other)) and all(value.any() for value in slow(other).values())
    assert (other.num_nights, other.num_undone) == (3, 0)
    for name in ("sleep/lessons", "sleep/buffer_items", "sleep/undone"):
        assert [night.metrics[name] for night in found] == [night.metrics[name] for night in expected]
    assert [i.tensors["prompt"].tolist() for i in other.buffer.items] == [
        i.tensors["prompt"].tolist() for i in one.buffer.items
    ]


def test_what_was_told_is_known_when_a_night_that_was_away_has_been_merged() -> None:
    reader, nights, stage = on_stage()
    before = slow(reader)
    tokens = sleepers.stream()
    for day in range(3):
        reader.read(tokens[day * DAY + bool(day) : (day + 1) * DAY + 1])
        assert not reader.settle() and reader.num_away == 1 and reader.num_nights == day, "it is being slept"
        assert tiny.same(slow(reader), before) and right(reader.model, slice(4 * day, 4 * day + 4)) <= 0.25
        (at_work,) = stage.busy
        at_work.answer()
        assert reader.settle() and not reader.settle() and reader.version == day + 1
        before = slow(reader)
    assert right(reader.model) >= 0.9 and len(reader.buffer) > 0
    assert nights.metrics()["sleep/merged"] == 3.0


def test_a_day_that_wrote_nothing_has_a_night_all_the_same() -> None:
    config = run_config(sleep__min_gain_nats=1e6)
    one, other = plain(config), away(config, local_nights(config))
    assert [night.kept for night in days(other)] == [True] * 3 == [night.kept for night in days(one)]
    assert other.num_away == 0 and other.num_nights == one.num_nights == 3 and other.version == 0


def test_as_many_nights_are_away_as_may_be() -> None:
    config = run_config(sleep_actor__synchronous=False, sleep_actor__queue_nights=1)
    reader = away(config, local_nights(config))
    days(reader)
    assert reader.num_away == 1 and reader.version == 2 and reader.num_nights == 2
    assert reader.settle(wait=True) and not reader.settle(wait=True) and reader.num_away == 0
    patient, _, _ = on_stage(sleep_actor__queue_nights=1)
    patient._patience_s = 0.0
    with pytest.raises(TimeoutError, match=r"^no night has ended within timeout_s = 0: sleeper 0 is at night 0, try 1"):
        days(patient)


@pytest.mark.parametrize("synchronous", [True, False])
def test_what_the_guard_refuses_leaves_no_trace_and_is_given_up_in_the_end(synchronous: bool) -> None:
    config = run_config(**QUICK, sleep_actor__synchronous=synchronous, sleep_actor__max_tries=2)
    nights = local_nights(config)
    reader = away(config, nights, bound_nats=NEVER)
    shift(reader)
    for value in slow_of(reader).values():
        value.data.normal_(std=1e-3, generator=torch.Generator().manual_seed(3))
    before = slow(reader)
    (night,) = reader.read(sleepers.stream(1))
    if synchronous:
        assert not night.kept and night.metrics["sleep/undone"] == 1.0
    else:
        assert night.kept and "sleep/undone" not in night.metrics, "nothing is known yet"
        assert reader.settle(wait=True) and reader.num_away == 1 and reader.num_nights == 0, "it is tried again"
        assert reader.settle(wait=True)
    assert tiny.same(slow(reader), before)
    assert (reader.num_away, reader.version, reader.num_nights, reader.num_undone) == (0, 0, 1, 1)
    assert len(reader.buffer) == 0, "what was not learned is not kept as an old lesson"
    metrics = nights.metrics()
    assert (metrics["sleep/nights"], metrics["sleep/refused"], metrics["sleep/given_up"]) == (2.0, 2.0, 1.0)


def slow_of(reader: AwaySleeper) -> dict[str, torch.Tensor]:
    from cortex_core.consolidation.sleep import slow_values

    return slow_values(reader.model)


@pytest.mark.parametrize("cut", [DAY + 70, 2 * DAY + 1, 2 * DAY + 100])
def test_it_goes_on_from_its_files_with_the_nights_that_are_away(tmp_path: Path, cut: int) -> None:
    config, tokens = run_config(sleep_actor__synchronous=False), sleepers.stream()
    undisturbed, first, second = (away(config, local_nights(config)) for _ in range(3))
    undisturbed.read(tokens)
    first.read(tokens[:cut])
    assert first.num_away == cut // DAY
    first.save(tmp_path)
    second.load(tmp_path)
    assert second.num_away == first.num_away and second.num_tokens == cut and second.version == 0
    second.read(tokens[cut:])
    for reader in (undisturbed, second):
        while reader.settle(wait=True):
            pass
    assert tiny.same(slow(undisturbed), slow(second)) and second.version == undisturbed.version == 3
    assert second.num_nights == 3 and right(second.model) >= 0.7


def test_it_goes_on_with_its_backbone_in_other_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of shards, a worker sees nothing that it could know the backbone by."""
    config = run_config()
    for shards in ("whole", "in two"):
        monkeypatch.setattr(Cortex, "identity", lambda model, shards=shards: {"backbone": shards, "sidecars": ""})
        reader = away(config, local_nights(config))
        if shards == "in two":
            reader.load(tmp_path)
        reader.read(sleepers.stream(1)[reader.num_tokens :][:40])
        reader.save(tmp_path)
    assert reader.num_tokens == 80


def test_how_often_a_night_was_tried_is_not_forgotten(tmp_path: Path) -> None:
    config = run_config(**QUICK, sleep_actor__synchronous=False, sleep_actor__max_tries=2)
    first, nights = away(config, local_nights(config), bound_nats=NEVER), local_nights(config)
    first.read(sleepers.stream(1))
    assert first.settle(wait=True) and first.num_away == 1
    first.save(tmp_path)
    second = away(config, nights, bound_nats=NEVER)
    second.load(tmp_path)
    assert second.settle(wait=True) and second.num_away == 0 and second.num_undone == 1
    assert nights.metrics()["sleep/nights"] == 1.0


@pytest.mark.parametrize("damage", ["no tries", "no version", "another night", "gone"])
def test_files_that_are_damaged_are_refused(tmp_path: Path, damage: str) -> None:
    config = run_config(sleep_actor__synchronous=False)
    first, second = away(config, local_nights(config)), away(config, local_nights(config))
    first.read(sleepers.stream(1))
    first.save(tmp_path)
    tensors, notes = files.read(tmp_path / AWAY, SCHEMA, "nights")
    if damage == "no tries":
        notes["tries"] = {}
    elif damage == "no version":
        del notes["version"]
    elif damage == "another night":
        tensors["x/tonight.prompt"] = torch.zeros(1)
    files.write(tmp_path / AWAY, SCHEMA, tensors, notes)
    if damage == "gone":
        (tmp_path / AWAY).unlink()
    with pytest.raises(DataError, match=r"away\.safetensors: (.*it is damaged|there is no such file)"):
        second.load(tmp_path)
    assert second.num_away == 0 and second.num_tokens == 0


class Otherwise(AwaySleeper):
    """A worker whose sums come out a little different."""

    def _cues(self) -> list[list[int]]:
        found = super()._cues()
        self.asked = len(found)
        return found

    def lessons(self) -> Lessons:
        found = super().lessons()
        return replace_gain(found.at(torch.arange(max(0, len(found) - 1))))


def replace_gain(found: Lessons) -> Lessons:
    return Lessons(Prompts(found.prompts.input_ids, found.prompts.lengths), found.taught, found.gain_nats * 0.5)


@pytest.mark.parametrize("how", ["synchronous", "away", "refused", "stale"])
def test_two_workers_have_the_same_slow_weights_to_the_bit(how: str) -> None:
    """Though the second works out other lessons; if one waited for a word that never comes, both would give up."""
    changes: dict[str, Any] = {"sleep_actor__synchronous": how == "synchronous"}
    changes |= QUICK | {"sleep_actor__max_tries": 2} if how == "refused" else {}
    changes |= {"sleep_actor__max_staleness": 0} if how == "stale" else {}
    config, two = run_config(**changes), Two()
    nights = local_nights(config)
    readers = [
        away(
            config, nights if rank == 0 else None, two.from_first(rank), Otherwise if rank else AwaySleeper,
            bound_nats=NEVER if how == "refused" else 0.01,
        )
        for rank in range(2)
    ]  # fmt: skip

    def live(rank: int) -> None:
        days(readers[rank])
        while readers[rank].settle(wait=True):
            pass

    two.run(live)
    first, second = readers
    assert tiny.same(slow(first), slow(second)) and first.num_away == second.num_away == 0
    assert first.num_tokens == second.num_tokens and first.version == second.version
    assert [(i.importance, i.tensors["prompt"].tolist()) for i in first.buffer.items] == [
        (i.importance, i.tensors["prompt"].tolist()) for i in second.buffer.items
    ]
    assert (first.num_nights, first.num_undone) == (second.num_nights, second.num_undone) == (3, 3 * (how == "refused"))
    metrics = nights.metrics()
    assert metrics["sleep/refused"] == 6.0 * (how == "refused")
    assert bool(metrics["sleep/stale"]) == (how in ("stale", "away")), "all three begin with the same weights"
    assert all(bool(value.any()) == (how != "refused") for value in slow(first).values())


def test_a_second_worker_goes_on_from_the_files_of_the_first(tmp_path: Path) -> None:
    config, two = run_config(sleep_actor__synchronous=False), Two()
    first = away(config, local_nights(config))
    first.read(sleepers.stream()[: 2 * DAY + 30])
    first.save(tmp_path)

    readers = [away(config, local_nights(config) if rank == 0 else None, two.from_first(rank)) for rank in range(2)]

    def go_on(rank: int) -> AwaySleeper:
        reader = readers[rank]
        reader.load(tmp_path)
        reader.read(sleepers.stream()[2 * DAY + 30 :])
        while reader.settle(wait=True):
            pass
        return reader

    one, other = two.run(go_on)
    assert tiny.same(slow(one), slow(other)) and one.version == other.version == 3 and one.num_nights == 3


def test_dreams_from_a_pool_are_those_that_it_would_dream_itself() -> None:
    """Without staleness; in other company, whatever the number of tickets in a call."""
    config = run_config(sleep__dream_frac=0.5)
    own, pooled = life(config), life(config, local_pool(config))
    dreamed = 0
    for mine, theirs in zip(own.live(), pooled.live(), strict=True):
        assert mine.number == theirs.number
        tables = [reader.sleeper.dreams.table for reader in (own, pooled)]  # type: ignore[union-attr]
        assert [(d.ticket, d.walk, d.lines, d.prompt, d.answer.tokens, v.passed, v.reasons) for d, v in tables[0]] == [
            (d.ticket, d.walk, d.lines, d.prompt, d.answer.tokens, v.passed, v.reasons) for d, v in tables[1]
        ]
        dreamed += len(tables[1])
    assert dreamed == 24 and tiny.same(slow(own.sleeper), slow(pooled.sleeper))
    assert isinstance(pooled.sleeper.dreams, PooledDreams)


def test_dreams_go_on_with_the_tickets_that_were_not_used(tmp_path: Path) -> None:
    config = run_config(sleep__dream_frac=0.5)

    def dreams_of(found: Any) -> PooledDreams:
        assert isinstance(found.sleeper.dreams, PooledDreams)
        return found.sleeper.dreams

    first, second = life(config, local_pool(config)), life(config, local_pool(config))
    for _ in zip(range(2), first.live(), strict=False):
        pass
    state = dreams_of(first).pool_state()
    assert state == {"version": 1, "ledger": {"used_below": 12, "used_above": []}}
    first.sleeper.save(tmp_path)
    second.sleeper.load(tmp_path)
    dreams_of(second).load_pool_state(state)
    for reader in (first, second):
        list(reader.live())
    tables = [[(d.ticket, d.model_version, d.prompt) for d, _ in dreams_of(r).table] for r in (first, second)]
    assert tables[0] == tables[1] and [ticket for ticket, _, _ in tables[0]] == [*range(12, 24)]
    assert tiny.same(slow(first.sleeper), slow(second.sleeper))
    with pytest.raises(DataError, match=r"^away\.safetensors: it has no pool of dreams .* from a run without"):
        dreams_of(second).load_pool_state(None)


def test_the_second_worker_has_the_dreams_of_the_first() -> None:
    config, two = run_config(sleep__dream_frac=1.0), Two()
    lives = [life(config, local_pool(config), two.from_first(rank)) for rank in range(2)]
    dreams = [each.sleeper.dreams for each in lives]
    assert all(isinstance(each, PooledDreams) for each in dreams)
    dreams[1]._pool = None  # type: ignore[union-attr]
    two.run(lambda rank: list(lives[rank].live()))
    tables = [[(d, v.passed) for d, v in each.table] for each in dreams if isinstance(each, Dreams)]
    assert tables[0] == tables[1] and len(tables[0]) == 12
