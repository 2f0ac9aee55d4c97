"""A coder goes on learning by night, and keeps what it has seen, whatever the night does to slow weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cortex_core.config import CodesConfig, ReplayConfig, SegmentsConfig
from cortex_core.consolidation import sleep
from cortex_core.consolidation.codes import SegmentCoder, StatisticsShape
from cortex_core.consolidation.diary import Diary
from cortex_core.consolidation.night_codes import CODE, CODER, NightCodes
from cortex_core.consolidation.record import Segment
from cortex_core.consolidation.sleeper import Sleeper
from cortex_core.consolidation.statistics import Statistics
from cortex_core.errors import DataError
from tests.consolidation import sleepers

SMALL = CodesConfig(code_size=8, hidden_size=16, learning_rate=3e-3)
SEGMENTS = SegmentsConfig()


def codes(capacity_items: int = 1024) -> NightCodes:
    model = sleepers.fresh_model()
    found = Diary(model, SEGMENTS, ["x"]).read(torch.tensor([sleepers.stream(2)[:512]]))
    torch.manual_seed(0)
    coder = SegmentCoder(StatisticsShape.of(Statistics.of(found)), SMALL)
    return NightCodes(model, coder, SEGMENTS, ReplayConfig(capacity_items=capacity_items), "a backbone")


def test_a_day_is_coded_to_its_last_window() -> None:
    keeper, day = codes(), sleepers.stream(2)[:512]
    metrics = keeper.night(day, steps=5)
    assert metrics["codes/error_after"] < metrics["codes/error_before"]
    items = keeper.buffer.items
    assert len(items) == metrics["codes/segments"] > 10 and keeper.buffer.num_sleeps == 1
    segments = [
        Segment.from_payload({n: part for n, part in item.tensors.items() if n != CODE}, item.notes) for item in items
    ]
    assert any(segment.first >= 256 for segment in segments), "the last window too"
    assert all(torch.equal(s.token_ids, torch.tensor(day[s.first : s.stop])) for s in segments)
    assert all(item.tensors[CODE].shape == (8,) for item in items)
    assert keeper.night(day[:100], steps=5) == {"codes/segments": 0.0}, "no whole window, nothing to code"


def test_old_segments_are_learned_again_and_the_least_surprising_go() -> None:
    keeper = codes(capacity_items=15)
    first = keeper.night(sleepers.stream(1)[:256], steps=1)
    second = keeper.night(sleepers.stream(2)[257:513], steps=1)
    assert first["codes/segments"] + second["codes/segments"] > 15 == len(keeper.buffer)
    kept = sorted(item.importance for item in keeper.buffer.items)
    assert kept[0] > 0


def test_codes_go_on_from_files(tmp_path: Path) -> None:
    undisturbed, days = codes(), (sleepers.stream(1)[:256], sleepers.stream(2)[257:513])
    undisturbed.night(days[0], steps=3)
    undisturbed.save(tmp_path)
    again = codes()
    again.load(tmp_path)
    assert undisturbed.night(days[1], steps=3) == pytest.approx(again.night(days[1], steps=3), rel=1e-5)
    for name, value in undisturbed.coder.state_dict().items():
        torch.testing.assert_close(value, again.coder.state_dict()[name])
    (tmp_path / CODER).unlink()
    with pytest.raises(DataError, match=r"coder\.safetensors: there is no such file"):
        again.load(tmp_path)


def test_what_is_learned_of_facts_does_not_depend_on_codes() -> None:
    def reader(keeper: NightCodes | None) -> Sleeper:
        model = sleepers.fresh_model() if keeper is None else keeper.model
        settings = sleepers.QUICK.model_copy(update={"steps": 3})
        return Sleeper(model, settings, ReplayConfig(), encode=sleepers.encode, codes=keeper)

    plain, coded = reader(None), reader(codes())
    (night,) = coded.read(sleepers.stream(1))
    plain.read(sleepers.stream(1))
    assert night.metrics["codes/segments"] > 0
    for mine, theirs in zip(*(sleep.slow_values(r.model).values() for r in (plain, coded)), strict=True):
        assert torch.equal(mine, theirs)
