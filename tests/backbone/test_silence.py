"""A write filter in reading and generation: what it names is never written, whatever it was and however it came."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cortex_core.backbone import reading
from cortex_core.backbone.model import Cortex
from cortex_core.backbone.segments import checked_rows
from cortex_core.backbone.session import Session
from cortex_core.config import FastWeightsConfig
from cortex_core.privacy.personal_data import PersonalData
from tests import tiny

TAPS = 4
MAIL, OTHER = "jo.doe@example.com", "hy.dqe@example.com"
TOKENIZER = tiny.vocabulary().tokenizer


def ids_of(*pieces: str) -> list[int]:
    return [token for piece in pieces for token in TOKENIZER.encode(piece, add_special_tokens=False)]


def text_with(item: str, *, before: int = 4, total: int = 80) -> tuple[Tensor, range]:
    """`total` tokens, `before` words in front of the item; every segment ends with a line, unless the item is there."""
    words = [token for word in tiny.NOUNS * 12 for token in ids_of(f" {word}")]
    line, space, secret = ids_of("\n"), ids_of(" "), ids_of(item)
    ids = [*words[:before], *space, *secret]
    ids += line + words[: total - len(ids) - 1]
    where = range(before + 1, before + 1 + len(secret))
    for end in range(tiny.SEGMENT - 1, total, tiny.SEGMENT):
        if end not in where:
            ids[end] = line[0]
    return torch.tensor([ids]), where


def remembering(layer: int, *, filtered: bool = True) -> Cortex:
    """One memory at `layer` whose gate hears of nothing that the memory holds, and which writes about every token."""
    settings = FastWeightsConfig(rank=16, chunk_size=8, layers=(layer,), controller=False, dead_zone=0.1, taps=TAPS)
    model = tiny.model(settings)
    generator = torch.Generator().manual_seed(1)
    for sidecar in model.sidecars.values():
        nn.init.constant_(sidecar.output_gate, 1.5)
        for weights in (sidecar.write_gate.weight, sidecar.addresses.key_taps):
            nn.init.normal_(weights, std=0.3, generator=generator)
    model.write_filter = PersonalData(TOKENIZER) if filtered else None
    return model


def told(model: Cortex, ids: Tensor, silent: set[int] | None = None) -> Session:
    """A session with a log that has read `ids`, with the gates of some positions forced to 0."""
    session = model.new_session(len(ids), log_writes=1000)
    rows = checked_rows(ids, None, None, len(ids))[0].with_tags()
    assert rows.tags is not None
    shut = torch.tensor([place in (silent or ()) for place in range(ids.shape[1])]).expand(ids.shape)
    reading.advance(model, session, rows._replace(tags=rows.tags._replace(silent=shut)), keep=0 * rows.lengths)
    return session


def same(one: Session, other: Session) -> bool:
    return all(torch.equal(one.states[n].up, other.states[n].up) for n in one.states)


@pytest.mark.parametrize("layer", [0, 1])
@torch.no_grad()
def test_the_state_is_that_of_gates_forced_to_0(layer: int) -> None:
    """On the item's tokens and the few behind it whose taps look back at it, and nowhere else."""
    ids, where = text_with(MAIL)
    filtered = told(remembering(layer), ids)
    shut = set(range(where.start, where.stop + TAPS - 1))
    plain = remembering(layer, filtered=False)
    assert same(filtered, told(plain, ids, shut))
    assert not same(filtered, told(plain, ids))
    written = {w.position for w in filtered.writes()}
    assert not written & shut and {where.stop + TAPS - 1, where.start - 2} <= written


@torch.no_grad()
def test_the_first_tokens_behind_a_segment_that_ends_with_the_item_are_not_written_either() -> None:
    _, somewhere = text_with(MAIL)
    ids, where = text_with(MAIL, before=tiny.SEGMENT - 1 - len(somewhere))
    assert where.stop == tiny.SEGMENT
    whole, split = told(remembering(1), ids), remembering(1).new_session(1, log_writes=1000)
    for first, stop in itertools.pairwise((0, 32, 33, 40, 80)):
        remembering(1).read(ids[:, first:stop], split)
    for session in (whole, split):
        written = {w.position for w in session.writes()}
        assert not written & set(range(where.start, where.stop + TAPS - 1))
        assert where.stop + TAPS - 1 in written


@torch.no_grad()
def test_the_state_is_the_same_bit_for_bit_whatever_the_item_was() -> None:
    """Where the layer's input is the token alone; in higher layers attention tells later tokens of earlier ones."""
    model = remembering(0)
    (ids, where), (others, _) = text_with(MAIL), text_with(OTHER)
    assert ids.shape == others.shape and not torch.equal(ids[0, list(where)], others[0, list(where)])
    assert same(told(model, ids), told(model, others))
    unfiltered = remembering(0, filtered=False)
    assert not same(told(unfiltered, ids), told(unfiltered, others))


@pytest.mark.parametrize("before", [4, 20])
@torch.no_grad()
def test_any_split_into_calls_leaves_the_same_state(before: int) -> None:
    """In one segment, and across the border of two: also token by token, when the rest of the item is not known yet."""
    model = remembering(1)
    ids, where = text_with(MAIL, before=before, total=100)
    assert (tiny.SEGMENT in where) == (before == 20)
    whole = told(model, ids)
    inside = where.start + 7
    for cuts in (range(1, 100), (inside,), (31, 33, 64), (where.start, where.stop)):
        session = model.new_session(1, log_writes=1000)
        for first, stop in itertools.pairwise((0, *cuts, 100)):
            model.read(ids[:, first:stop], session)
        assert not {w.position for w in session.writes()} & set(where)
        assert max(float((session.states[n].up - whole.states[n].up).abs().max()) for n in whole.states) < 2e-6


@torch.no_grad()
def test_an_item_longer_than_many_segments_and_a_saved_session(tmp_path: Path) -> None:
    """A private key over a dozen segments; the session is saved and loaded in the middle of it."""
    body = "\n".join("QUJD" * 16 for _ in range(5))
    model = remembering(1)
    key = f"-----BEGIN PRIVATE KEY-----\n{body}\n-----END PRIVATE KEY-----"
    ids, where = text_with(key, total=700)
    assert len(where) > 10 * tiny.SEGMENT and len(where) < 600
    session = model.new_session(1, log_writes=1000)
    model.read(ids[:, :220], session)
    session.save(tmp_path / "chat")
    again = model.load_session(tmp_path / "chat")
    for one in (session, again):
        model.read(ids[:, 220:], one)
        positions = {w.position for w in one.writes()}
        assert not positions & set(where)
        assert {p for p in positions if p < where.start} and {p for p in positions if p >= where.stop + TAPS}
    assert same(session, again)


@torch.no_grad()
def test_rows_are_filtered_each_for_itself_and_padding_does_not_matter() -> None:
    model = remembering(1)
    (first, _), (second, _) = text_with(MAIL, before=4), text_with(OTHER, before=9)
    mask = torch.ones(2, 80, dtype=torch.long)
    mask[1, :10] = 0
    padded = torch.cat([torch.zeros(1, 10, dtype=torch.long), second[:, :70]], dim=1)
    together = model.new_session(2)
    model.read(torch.cat([first, padded]), together, attention_mask=mask)
    for row, ids in enumerate((first, second[:, :70])):
        alone = told(model, ids)
        assert float((alone.states[1].up[0] - together.states[1].up[row]).abs().max()) < 2e-6


@torch.no_grad()
def test_generation_writes_what_reading_writes() -> None:
    """The session is that of reading the text; what is made, and the item in the prompt, wait for their segment."""
    model, (ids, where) = remembering(1), text_with(MAIL, before=2, total=28)
    session = model.new_session(1, log_writes=1000)
    out = model.generate(input_ids=ids, session=session, max_new_tokens=50, do_sample=False, eos_token_id=None)
    assert out.shape == (1, 78)
    read = told(model, out)
    assert [w.position for w in session.writes()] == [w.position for w in read.writes()]
    assert max(float((session.states[n].up - read.states[n].up).abs().max()) for n in read.states) < 2e-6
    assert not {w.position for w in session.writes()} & set(where)


@torch.no_grad()
def test_without_a_session_the_filter_acts_as_with_one() -> None:
    model, (ids, _) = remembering(1), text_with(MAIL, total=30)
    with_one = model(input_ids=ids, session=model.new_session()).logits
    assert torch.allclose(model(input_ids=ids).logits, with_one, atol=1e-5)
    model.write_filter = None
    assert not torch.allclose(model(input_ids=ids).logits, with_one, atol=1e-5)
    session = model.new_session()
    model.read(ids, session)
    assert session.before is None
