"""A diary says what was surprising, and what it did, whatever the calls in which a text was read."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cortex_core.backbone.model import Cortex
from cortex_core.config import SegmentsConfig
from cortex_core.consolidation.diary import Diary
from cortex_core.consolidation.record import Segment
from cortex_core.errors import ConfigError
from cortex_core.training.streams import fact_streams
from tests.consolidation import sleepers

WINDOWS, CONFIG = 4, SegmentsConfig(max_tokens=40)


@cache
def model() -> Cortex:
    return sleepers.fresh_model()


@cache
def streams() -> Tensor:
    vocabulary = sleepers.book().vocabulary
    return fact_streams(vocabulary, sleepers.corpus(), "train", 2, WINDOWS, model().segment_tokens, seed=3)


@cache
def read_at_once() -> list[Segment]:
    return Diary(model(), CONFIG, ["a", "b"]).read(streams())


def test_streams_tell_facts_in_text_of_their_own() -> None:
    ids, width = streams(), model().segment_tokens
    assert ids.shape == (2, WINDOWS * width) and not torch.equal(ids[0], ids[1])
    opens = sleepers.encode(" remember")[0]
    for window in ids.split(width, dim=1):
        assert ((window == opens).sum(1) >= 2).all(), "two facts in each window, and whatever the text says"


def test_a_diary_does_not_depend_on_how_the_streams_are_cut() -> None:
    width, cut = model().segment_tokens, Diary(model(), CONFIG, ["a", "b"])
    parts = streams().split([width, 2 * width, width], dim=1)
    found, expected = [segment for part in parts for segment in cut.read(part)], read_at_once()
    assert len(found) == len(expected) > 20
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.first, mine.stop, mine.source) == (theirs.first, theirs.stop, theirs.source)
        assert torch.equal(mine.token_ids, theirs.token_ids)
        for layer, stats in mine.stats.items():
            assert torch.equal(stats.delta_up, theirs.stats[layer].delta_up)
            torch.testing.assert_close(stats.mean, theirs.stats[layer].mean)


def test_segments_are_where_their_tokens_stand() -> None:
    """Every window but the last, which has not been written yet; and what is told is written in some of them."""
    last = (WINDOWS - 1) * model().segment_tokens
    for segment in read_at_once():
        row = ["a", "b"].index(segment.source)
        assert torch.equal(segment.token_ids, streams()[row, segment.first : segment.stop])
        assert segment.stop <= last
    assert any(bool(stats.delta_up.any()) for segment in read_at_once() for stats in segment.stats.values())


@torch.no_grad()
def test_surprise_is_the_loss_of_the_token_that_was_read() -> None:
    width = model().segment_tokens
    logits = model()(streams(), session=model().new_session(2)).logits
    assert logits is not None
    loss = functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), streams()[:, 1:].flatten(), reduction="none")
    loss = loss.unflatten(0, (2, -1))
    inside = [segment for segment in read_at_once() if segment.first > 0 and segment.first % width]
    assert inside
    for segment in inside:
        row = ["a", "b"].index(segment.source)
        expected = float(loss[row, segment.first - 1 : segment.stop - 1].mean())
        assert segment.mean_surprise == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_what_is_kept_of_the_input_is_that_of_the_layer() -> None:
    """A window read alone, without anything before it, gives the layers the same input: attention sees no further."""
    found: dict[int, Tensor] = {}
    width = model().segment_tokens

    def keep(layer: int):  # noqa: ANN202
        return lambda _, args, named: found.__setitem__(layer, named["hidden_states"] if named else args[0])

    handles = [m.register_forward_pre_hook(keep(n), with_kwargs=True) for m, (n, _) in model().ports.items()]
    with torch.no_grad():
        model().read(streams()[1:, width : 2 * width], model().new_session(1))
    for handle in handles:
        handle.remove()
    first = next(s for s in read_at_once() if s.source == "b" and width <= s.first and s.stop <= 2 * width)
    inside = slice(first.first - width, first.stop - width)
    layer = min(found)  # later ones also see what the memory adds
    torch.testing.assert_close(first.stats[layer].mean, found[layer][-1, inside].mean(0), atol=1e-4, rtol=1e-4)


def test_other_pieces_than_windows_are_refused() -> None:
    diary = Diary(model(), CONFIG, ["a", "b"])
    for wrong in (streams()[:, :100], streams()[:1]):
        with pytest.raises(ConfigError, match="must be 2 streams, of a multiple of 256 tokens"):
            diary.read(wrong)
