"""From the log of a session to memories."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cortex_core.backbone.session import Session
from cortex_core.config import FastWeightsConfig
from cortex_core.dreaming.memories import Span, written
from cortex_core.errors import ConfigError
from tests import tiny

TOKENS = torch.randint(0, 200, (1, 5 * tiny.SEGMENT + 3), generator=torch.Generator().manual_seed(2))
STREAM = TOKENS[0].tolist()
ASK = (1, 2)


@pytest.fixture(scope="module")
def session() -> Session:
    """Two layers whose gates do not open at the same tokens."""
    model = tiny.model(FastWeightsConfig(rank=8, chunk_size=tiny.CHUNK, dead_zone=0.35, layers=(0, 1)), open_gates=True)
    session = model.new_session(log_writes=256)
    model.read(TOKENS, session)
    return session


def test_a_memory_is_a_write_with_what_stood_around_it(session: Session) -> None:
    strongest: dict[int, float] = {}
    for write in session.writes():
        strongest[write.position] = max(write.strength, strongest.get(write.position, 0.0))
    found = written(session, STREAM, 0, ASK, span=Span(before=3, after=2, cue=2, context=4), min_write=0.2, segment=6)
    assert [m.position for m in found] == [p for p, s in sorted(strongest.items()) if s >= 0.2 and p >= 3]
    assert [m.id for m in found] == list(range(len(found))) and len(found) > 3
    for memory in found:
        at = memory.position
        assert memory.tokens == tuple(STREAM[at - 3 : at + 3])
        assert memory.cue == (*ASK, *STREAM[at - 2 : at]) and memory.answer == (STREAM[at],)
        assert memory.context == tuple(STREAM[max(0, at - 7) : at - 3])
        assert memory.importance == pytest.approx(strongest[at]) and memory.segment == 6


def test_an_address_is_the_keys_of_all_layers(session: Session) -> None:
    assert session.log is not None
    found = {m.position: m.address for m in written(session, STREAM, 0, ASK)}
    at = 0
    for log in session.log.layers.values():
        keys = log.written.keys[0].transpose(0, 1).flatten(1)
        for key, position in zip(keys, log.positions[0].tolist(), strict=True):
            if position in found:
                assert found[position][at : at + len(key)] == pytest.approx(key.numpy())
        at += keys.shape[1]
    assert {len(address) for address in found.values()} == {at}
    by_layer = [set(log.positions[0].tolist()) for log in session.log.layers.values()]
    alone = (by_layer[0] ^ by_layer[1]) & found.keys()
    assert alone and all(np.any(found[p] == 0) for p in alone)


def test_tokens_may_begin_anywhere(session: Session) -> None:
    whole, part = written(session, STREAM, 0, ASK), written(session, STREAM[40:90], 40, ASK, next_id=9)
    expected = {m.position: m for m in whole if 42 <= m.position < 90}
    assert [m.position for m in part] == list(expected) and part[0].id == 9
    for memory in part:
        assert memory.cue == expected[memory.position].cue
        assert memory.context == expected[memory.position].context[-len(memory.context) or 99 :]


def test_without_a_log_nothing_is_known() -> None:
    model = tiny.model()
    for session in (model.new_session(), model.new_session(2, log_writes=4)):
        with pytest.raises(ConfigError, match=r"new_session\(1, log_writes=…\)"):
            written(session, STREAM, 0, ASK)
