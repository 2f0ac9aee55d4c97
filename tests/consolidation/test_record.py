"""What is recorded of a segment: as computed from the whole stream, however it was read."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex_core.backbone.session import Session
from cortex_core.config import ReplayConfig, SegmentsConfig
from cortex_core.consolidation.record import Chunk, Segment, finish, record, states_of_session
from cortex_core.consolidation.replay import ReplayBuffer
from cortex_core.consolidation.segments import SegmentState, detect
from cortex_core.errors import ConfigError, DataError
from tests.backbone.families import SEGMENT, random_ids, with_memory
from tests.consolidation.scenes import BATCH, CONFIG, LAYERS, SOURCES, TOKENS, Stream, read_in_calls


def by_place(segments: list[Segment]) -> dict[tuple[str, int], Segment]:
    return {(segment.source, segment.first): segment for segment in segments}


def apart(one: Segment, other: Segment) -> float:
    """Largest distance of any number of theirs; the rest must be equal."""
    a, b = one.payload(), other.payload()
    assert a[0].keys() == b[0].keys()
    assert torch.equal(one.token_ids, other.token_ids)
    assert (one.first, one.stop, one.source, one.step) == (other.first, other.stop, other.source, other.step)
    assert one.peak_surprise == other.peak_surprise
    tensors = max(float((a[0][name] - b[0][name]).abs().max()) for name in a[0])
    return max(tensors, abs(one.mean_surprise - other.mean_surprise))


@pytest.mark.parametrize("hebbian", [False, True], ids=["delta", "hebbian"])
def test_it_is_what_the_whole_stream_says(hebbian: bool) -> None:
    stream = Stream(hebbian=hebbian)
    segments, _ = read_in_calls(stream, [])
    assert len(segments) >= 2 * BATCH
    for segment in segments:
        row, now = SOURCES.index(segment.source), slice(segment.first, segment.stop)
        assert torch.equal(segment.token_ids, stream.token_ids[row, now])
        assert segment.num_tokens == len(segment.token_ids) and segment.step == 7
        surprise = stream.surprise[row, now]
        assert segment.peak_surprise == float(surprise.max())
        assert segment.mean_surprise == pytest.approx(float(surprise.double().mean()))
        assert tuple(segment.stats) == LAYERS
        for layer, stats in segment.stats.items():
            hidden = stream.hidden[layer][row, now].double()
            assert torch.allclose(stats.mean.double(), hidden.mean(0), atol=1e-5)
            assert torch.allclose(stats.variance.double(), hidden.var(0, correction=0), atol=1e-5)
            up = stream.up[layer][row]
            assert torch.equal(stats.delta_up, up[segment.stop] - up[segment.first])
            down = stream.down[layer]
            assert (stats.delta_down is None) is (down is None)
            if down is not None and stats.delta_down is not None:
                assert torch.equal(stats.delta_down, down[row, segment.stop] - down[row, segment.first])


@settings(max_examples=12)
@given(st.lists(st.integers(0, TOKENS), max_size=6), st.integers(0, 5))
def test_any_split_over_calls_records_the_same(cuts: list[int], seed: int) -> None:
    stream = Stream(seed)
    whole, open_whole = read_in_calls(stream, [])
    parts, open_parts = read_in_calls(stream, cuts)
    ends = [finish(opened, stream.states_at, sources=SOURCES, step=7) for opened in (open_whole, open_parts)]
    expected, found = by_place(whole + ends[0]), by_place(parts + ends[1])
    assert found.keys() == expected.keys()
    assert max((apart(found[key], expected[key]) for key in found), default=0) < 1e-4


def test_states_are_asked_for_at_borders_alone() -> None:
    stream, asked = Stream(), []

    def counted(row: int, position: int):  # noqa: ANN202
        asked.append((SOURCES[row], position))
        return stream.states_at(row, position)

    segments, opened = read_in_calls(stream, [13, 14, 40], counted)
    borders = [(s.source, place) for s in segments for place in (s.first, s.stop)]
    borders += [(source, part.first) for source, part in zip(SOURCES, opened, strict=True) if part is not None]
    assert sorted(asked) == sorted(borders)


def test_padding_is_not_recorded() -> None:
    stream = Stream()
    lengths = torch.tensor([60, 41, 0])
    valid = torch.arange(TOKENS) < lengths[:, None]
    chunk = stream.chunk(0, TOKENS)
    marks, state = detect(chunk.surprise, SegmentState.zeros(BATCH), CONFIG, valid=valid)
    segments, opened = record(chunk, marks, (None,) * BATCH, stream.states_at, sources=SOURCES, step=0)
    segments += finish(opened, stream.states_at, sources=SOURCES, step=0)
    assert {segment.source for segment in segments} == {"a", "b"}
    assert all(segment.stop <= lengths[SOURCES.index(segment.source)] for segment in segments)
    found = by_place([segment for segment in segments if segment.source == "a"])
    for expected in read_in_calls(stream, [])[0]:
        if expected.source == "a":
            now = found["a", expected.first]
            assert (now.stop, now.mean_surprise) == (expected.stop, expected.mean_surprise)
    assert int(state.num_tokens[2]) == 0


@pytest.mark.parametrize("hebbian", [False, True], ids=["delta", "hebbian"])
def test_a_segment_survives_the_replay_buffer(hebbian: bool) -> None:
    segment = read_in_calls(Stream(hebbian=hebbian), [])[0][1]
    buffer = ReplayBuffer(ReplayConfig())
    number, _ = buffer.add(*segment.payload(), importance=segment.peak_surprise, surprise=segment.mean_surprise)
    item = buffer[number]
    again = Segment.from_payload(item.tensors, item.notes)
    assert apart(again, segment) == 0.0
    assert list(again.stats) == list(segment.stats)


@pytest.mark.parametrize(
    ("tensors", "notes", "message"),
    [
        ({}, {"stop": 5}, "not as many tokens as positions"),
        ({}, {"first": "0"}, "first is '0'"),
        ({}, {"source": 3}, "source is 3"),
        ({"1.variance": torch.zeros(2)}, {}, "(the statistics of layer 1 do not fit|TypeCheckError)"),
        ({"1.spread": torch.zeros(2)}, {}, "TypeError"),
        ({"one.mean": torch.zeros(2)}, {}, "invalid literal"),
        ({"7.mean": torch.zeros(2)}, {}, "TypeError"),
    ],
)
def test_what_is_no_segment_is_refused(tensors: dict, notes: dict, message: str) -> None:
    whole = read_in_calls(Stream(), [])[0][0].payload()
    with pytest.raises(DataError, match=f"not a segment.*{message}"):
        Segment.from_payload(whole[0] | tensors, whole[1] | notes)
    with pytest.raises(DataError, match="KeyError: 'step'"):
        Segment.from_payload(whole[0], {name: note for name, note in whole[1].items() if name != "step"})


# --- with a model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told() -> tuple[dict, Session, torch.Tensor]:
    """Sidecars, a session that has read two rows, and what it read."""
    model, ids = with_memory(controller=False), random_ids(2, 5 * SEGMENT + 1)
    session = model.new_session(2, log_writes=1000)
    with torch.no_grad():
        model.read(ids, session)
    return {"model": model, "sidecars": model.sidecars_by_layer}, session, ids


def test_a_log_gives_the_state_at_any_position(told: tuple) -> None:
    parts, session, ids = told
    states_at = states_of_session(session, parts["sidecars"])
    for segments in (0, 1, 3, 5):
        other = parts["model"].new_session(2)
        with torch.no_grad():
            parts["model"].read(ids[:, : segments * SEGMENT + 1], other)
        for row in range(2):
            for layer, state in states_at(row, segments * SEGMENT).items():
                expected = other.states[layer].up[row : row + 1]
                assert torch.allclose(state.up, expected, atol=1e-5)
    steps = [states_at(0, position)[1].up for position in range(SEGMENT, 2 * SEGMENT + 1)]
    changed = sum(not torch.equal(a, b) for a, b in itertools.pairwise(steps))
    written = {write.position for write in session.writes() if write.layer == 1 and write.row == 0}
    assert changed == sum(SEGMENT <= place < 2 * SEGMENT for place in written) > 0


def test_segments_of_a_session(told: tuple) -> None:
    """From surprise to records, as sleep uses it: the changes of all segments and of what lies between add up."""
    parts, session, ids = told
    generator = torch.Generator().manual_seed(2)
    read = 5 * SEGMENT
    hidden = {layer: torch.randn(2, read, 8, generator=generator) for layer in parts["sidecars"]}
    chunk = Chunk(ids[:, :read], torch.rand(2, read, generator=generator), hidden, torch.zeros(2, dtype=torch.long))
    marks, _ = detect(chunk.surprise, SegmentState.zeros(2), SegmentsConfig(max_tokens=8))
    states_at = states_of_session(session, parts["sidecars"])
    segments, _ = record(chunk, marks, (None, None), states_at, sources=["x", "y"], step=1)
    assert len(segments) > 4
    for segment in segments:
        row = ["x", "y"].index(segment.source)
        for layer, stats in segment.stats.items():
            before, after = states_at(row, segment.first)[layer], states_at(row, segment.stop)[layer]
            assert torch.equal(stats.delta_up, (after.up - before.up)[0])
    assert any(bool(stats.delta_up.any()) for segment in segments for stats in segment.stats.values())


def test_positions_that_a_session_cannot_know(told: tuple) -> None:
    parts, session, ids = told
    states_at = states_of_session(session, parts["sidecars"])
    with pytest.raises(
        ConfigError, match=r"position 161: row 0 has written up to 160, what follows is its open segment"
    ):
        states_at(0, 5 * SEGMENT + 1)
    short = parts["model"].new_session(2, log_writes=4)
    with torch.no_grad():
        parts["model"].read(ids, short)
    with pytest.raises(ConfigError, match=r"position 0: the log of layer 1 reaches back to \d+; .* log_writes than 4"):
        states_of_session(short, parts["sidecars"])(0, 0)
    with pytest.raises(ConfigError, match="keeps no log of its writes"):
        states_of_session(parts["model"].new_session(2), parts["sidecars"])
