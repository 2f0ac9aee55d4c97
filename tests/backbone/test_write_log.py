"""A session's log: where writes came from, taking them back, time to live. State against sessions never told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cortex_core.backbone import reading
from cortex_core.backbone.model import Cortex
from cortex_core.backbone.segments import checked_rows
from cortex_core.backbone.session import Session
from cortex_core.config import FastWeightsConfig
from cortex_core.errors import ConfigError
from tests.backbone.families import CHUNK, SEGMENT, bare, open_gates, random_ids, with_memory

EXACT = 1e-5
RULES = {
    "delta": {},
    "hebbian": {"rule": "hebbian", "write_strength": 0.02},
    "source": {"rule": "source", "write_strength": 0.02},
}


def remembering(**settings: object) -> Cortex:
    """One memory layer, whose gate does not depend on what the memory holds: leaving writes out changes no other."""
    settings = {"rank": 8, "chunk_size": CHUNK, "layers": (1,), "controller": False, **settings}
    model = Cortex.attach(bare("qwen2"), FastWeightsConfig(**settings), segment_tokens=SEGMENT)
    generator = torch.Generator().manual_seed(1)
    for sidecar in model.sidecars.values():
        torch.nn.init.constant_(sidecar.output_gate, 1.5)
        for weights in (sidecar.write_gate.weight, sidecar.addresses.key_taps):
            torch.nn.init.normal_(weights, std=0.3, generator=generator)
    return model


def apart(one: Session, other: Session) -> float:
    """Largest relative distance of any part of the states."""
    pairs = [
        (a, b)
        for layer, state in one.states.items()
        for a, b in zip(state, other.states[layer], strict=True)
        if a is not None and b is not None
    ]
    return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)) for a, b in pairs)


def never_told(model: Cortex, ids: Tensor, *places: range) -> Session:
    """A session that read all of `ids` from its start, but whose tokens at `places` wrote nothing."""
    session = model.new_session(len(ids), log_writes=1000)
    rows = checked_rows(ids, None, None, len(ids))[0].with_tags()
    assert rows.tags is not None
    silent = torch.tensor([any(place in run for run in places) for place in range(ids.shape[1])]).expand(ids.shape)
    reading.advance(model, session, rows._replace(tags=rows.tags._replace(silent=silent)), keep=0 * rows.lengths)
    return session


@pytest.mark.parametrize("decay_per", ["write", "token"])
@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_the_log_is_the_state_and_forgetting_is_not_having_been_told(rule: str, decay_per: str) -> None:
    model, ids = remembering(decay_per=decay_per, **RULES[rule]), random_ids(2, 110)
    session, plain = model.new_session(2, log_writes=1000), model.new_session(2)
    model.read(ids[:, :40], session, source="a")
    model.read(ids[:, 40:70], session, source="b")
    model.read(ids[:, 70:], session)
    model.read(ids, plain)
    assert apart(session, plain) < 1e-6
    assert session.log is not None
    sidecars = model.sidecars_by_layer
    again = session.fork()
    again.states = {n: log.replayed(sidecars[n], session.start_tokens) for n, log in session.log.layers.items()}
    assert apart(again, plain) < EXACT
    count = sum(write.source == "b" for write in session.writes())
    assert model.forget(session, "b") == count > 10
    expected = never_told(model, ids, range(40, 70))
    assert apart(session, expected) < EXACT
    assert apart(session, plain) > 1e-2
    assert {write.source for write in session.writes()} == {"a", None}


@torch.no_grad()
def test_provenance() -> None:
    model, ids = with_memory(), random_ids(2, 100)
    session = model.new_session(2, log_writes=1000)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0  # the second row has 20 tokens less
    model.read(ids[:, :50], session, attention_mask=mask[:, :50], source="mail-1")
    model(input_ids=ids[:, 50:], session=session, source="mail-2", logits_to_keep=1)
    writes = session.writes()
    assert {(w.layer, w.row) for w in writes} == {(1, 0), (1, 1), (2, 0), (2, 1)}
    for w in writes:
        assert w.token_id == int(ids[w.row, w.position + 20 * w.row])
        assert w.source == ("mail-1" if w.position < 50 - 20 * w.row else "mail-2")
        assert 0 < w.strength <= 1 and w.expires is None
        assert w.position < session.start_tokens[w.row]
    places = [w.position for w in writes if (w.layer, w.row) == (1, 0)]
    assert places == sorted(set(places)) and len(places) < 96  # some tokens were not written at all
    with pytest.raises(ConfigError, match="keeps no log"):
        model.new_session().writes()


@torch.no_grad()
def test_positions_rows_and_the_open_segment() -> None:
    """Forgetting a range of one row, part of which is still open: the rest of it is not written when it closes."""
    model, ids = remembering(), random_ids(2, 140)
    session = model.new_session(2, log_writes=1000)
    model.read(ids[:, :80], session)
    fork = session.fork()
    before = session.states[1].up.clone()
    assert model.forget(session, positions=(50, 75), rows=[1]) > 0
    assert torch.equal(session.states[1].up[0], before[0]) and not torch.equal(session.states[1].up[1], before[1])
    model.read(ids[:, 80:], session)
    model.read(ids[:, 80:], fork)
    expected = never_told(model, ids, range(50, 75))
    assert float((session.states[1].up[1] - expected.states[1].up[1]).abs().max()) < EXACT
    assert torch.equal(session.states[1].up[0], fork.states[1].up[0])
    assert not any(w.row == 1 and 50 <= w.position < 75 for w in session.writes())
    assert any(w.row == 1 and 50 <= w.position < 75 for w in fork.writes())  # the fork has not forgotten


@torch.no_grad()
def test_a_full_log_folds_its_oldest_writes() -> None:
    model, ids = remembering(decay_per="token"), random_ids(2, 200)
    session, plain = model.new_session(2, log_writes=45), model.new_session(2)
    for number, piece in enumerate(ids.split(50, dim=1)):
        model.read(piece, session, source=f"part-{number}")
    model.read(ids, plain)
    assert apart(session, plain) < 1e-6
    assert session.log is not None
    (log,) = session.log.layers.values()
    assert log.counts.tolist() == [45, 45] and int(log.start.min()) > 0
    sizes = session.num_bytes
    for source in ("part-0", None):
        with pytest.raises(ConfigError, match=r"writes before position \d+ have left the log of 45"):
            model.forget(session, source, positions=None if source else (0, 190))
    last = [w.position for w in session.writes() if w.row == 0]
    places = range(last[5], last[8] + 1)
    model.forget(session, positions=(places.start, places.stop), rows=[0])
    assert float((session.states[1].up - never_told(model, ids, places).states[1].up)[0].abs().max()) < EXACT
    model.forget(session, "part-3")
    assert session.num_bytes < sizes
    session.reset()
    assert session.writes() == [] and session.num_tokens.tolist() == [0, 0]
    model.read(ids, session)
    assert apart(session, plain) < 1e-6
    with pytest.raises(ConfigError, match="'part-0' was never read into this session; none was"):
        model.forget(session, "part-0")


@torch.no_grad()
def test_time_to_live_within_one_call_and_over_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three segments of writes with 70 tokens to live; at the end each token that is still due was never written."""
    model, ids = remembering(decay_per="token"), random_ids(2, 260)
    calls = []
    original = reading.read_segments
    monkeypatch.setattr(reading, "read_segments", lambda *a, **k: calls.append(a[1].shape[1]) or original(*a, **k))
    session = model.new_session(2, log_writes=1000)
    model.read(ids[:, :100], session, ttl_tokens=70, source="short")
    model.read(ids[:, 100:170], session)
    assert {w.expires - w.position for w in session.writes() if w.expires} == {70}
    # The open segment begins at 160: tokens up to 90 are gone, those from 91 on are not.
    assert min(w.position for w in session.writes()) > 90
    assert apart(session, never_told(model, ids[:, :170], range(91))) < EXACT
    calls.clear()
    model.read(ids[:, 170:], session)
    assert calls == [1, 3]  # split where the last of them expire, at 192, and nowhere else
    assert apart(session, never_told(model, ids, range(100))) < EXACT
    at_once = model.new_session(2, log_writes=1000)
    model.read(ids[:, :100], at_once, ttl_tokens=70, source="short")
    model.read(ids[:, 100:], at_once)
    assert apart(session, at_once) < 1e-6


@torch.no_grad()
def test_expiry_inside_the_call_that_wrote() -> None:
    model, ids = remembering(), random_ids(1, 150)
    session = model.new_session(1, log_writes=1000)
    model.read(ids, session, ttl_tokens=20)
    assert [w for w in session.writes() if w.position < 108] == []
    assert apart(session, never_told(model, ids, range(109))) < EXACT


@torch.no_grad()
def test_rows_of_unequal_length_expire_at_their_own_time() -> None:
    model, ids = remembering(), random_ids(2, 150)
    mask = torch.ones_like(ids)
    mask[1, :60] = 0
    together = model.new_session(2, log_writes=1000)
    model.read(ids, together, attention_mask=mask, ttl_tokens=40)
    for row, first in enumerate((0, 60)):
        alone = model.new_session(1, log_writes=1000)
        model.read(ids[row : row + 1, first:], alone, ttl_tokens=40)
        assert float((alone.states[1].up - together.states[1].up[row : row + 1]).abs().max()) < 2e-6
        assert [w.position for w in alone.writes()] == [w.position for w in together.writes() if w.row == row]


@torch.no_grad()
def test_wrong_requests_change_nothing() -> None:
    model, ids = remembering(), random_ids(1, 100)
    plain, session = model.new_session(), model.new_session(log_writes=5)
    for options in ({"source": "a"}, {"ttl_tokens": 9}):
        with pytest.raises(ConfigError, match=f"{next(iter(options))} = .* keeps no log"):
            model.read(ids, plain, **options)
    with pytest.raises(ConfigError, match="keeps no log"):
        model.forget(plain, "a")
    with pytest.raises(ConfigError, match=r"ttl_tokens = 0: at least 1"):
        model.read(ids, session, ttl_tokens=0)
    with pytest.raises(ConfigError, match="log_writes = 5 is too few for ttl_tokens"):
        model.read(ids, session, ttl_tokens=5000)
    assert session.num_tokens.tolist() == [0] and session.writes() == []
    with pytest.raises(ConfigError, match="say what, with source"):
        model.forget(session)
    with pytest.raises(ConfigError, match=r"rows = \[1\]: the session has rows 0 to 0"):
        model.forget(session, positions=(0, 5), rows=[1])
    with pytest.raises(ConfigError, match="log_writes = 0: keep at least 1"):
        model.new_session(log_writes=0)


@torch.no_grad()
def test_what_is_generated_has_a_source() -> None:
    model, ids = with_memory(layers=(1,)), random_ids(1, 50)
    session = model.new_session(log_writes=1000)
    model.read(ids[:, :30], session, source="question")
    out = model.generate(
        input_ids=ids[:, 30:], session=session, source="answer", max_new_tokens=20, do_sample=False, eos_token_id=None
    )
    for w in session.writes():
        assert w.source == ("question" if w.position < 30 else "answer")
    plain = model.new_session()
    model.read(torch.cat([ids[:, :30], out], dim=1), plain)
    assert apart(session, plain) < 1e-6


@torch.no_grad()
def test_a_model_with_a_controller_replays_what_it_wrote() -> None:
    """With surprise in the gate and two layers, the log is still the state: doses are those of the reading."""
    model = with_memory()
    open_gates(model)
    session = model.new_session(2, log_writes=1000)
    model.read(random_ids(2, 150), session)
    assert session.log is not None
    replayed = session.fork()
    replayed.states = {
        n: log.replayed(model.sidecars_by_layer[n], session.start_tokens) for n, log in session.log.layers.items()
    }
    assert apart(replayed, session) < EXACT
