"""Which tokens must not be written: those that a write filter names, and those that a session was told to forget."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from cortex_core.backbone.segments import Rows
from cortex_core.backbone.session import Session

if TYPE_CHECKING:
    from cortex_core.backbone.model import Cortex


def silent_tokens(model: Cortex, session: Session, rows: Rows) -> Bool[Tensor, "batch tokens"] | None:
    """True where nothing of `rows`, which begin with the session's open segment, must be written; None is nowhere.

    The filter sees each segment with what stood before it, and of a whole segment that it may go on: what is written of
    it does not depend on how much of the text is there already. The few tokens behind a hit, whose keys and gates look
    back at it, are not written either.
    """
    forgotten = None
    if rows.tags is not None and bool(rows.tags.silent.any()):
        forgotten = rows.tags.silent
    if model.write_filter is None:
        return forgotten
    found = _filtered(model, session, rows)
    return found if forgotten is None else found | forgotten


def context_after(model: Cortex, session: Session, rows: Rows, closed_tokens: Int[Tensor, " batch"]) -> Rows | None:
    """What the filter must see before the next open segment: the end of what is closed; None without a filter."""
    if model.write_filter is None:
        return None
    before = session.before or Rows.empty(session.batch_size, rows.lengths.device)
    known = before.then(rows._replace(tags=None)).upto(before.lengths + closed_tokens)
    return known.after((known.lengths - _context_tokens(model)).clamp_min(0))


def _context_tokens(model: Cortex) -> int:
    """Tokens before a segment that the filter sees: as many as it asks for, and those at which a gate looks back."""
    assert model.write_filter is not None
    return max(model.write_filter.context_tokens, model.fast_weights.taps - 1)


def _filtered(model: Cortex, session: Session, rows: Rows) -> Bool[Tensor, "batch tokens"]:
    assert model.write_filter is not None
    width, context, taps = model.segment_tokens, _context_tokens(model), model.fast_weights.taps - 1
    before = session.before or Rows.empty(session.batch_size, rows.lengths.device)
    windows, cut, places = [], [], []
    for row, (ids, length) in enumerate(zip(rows.input_ids.tolist(), rows.lengths.tolist(), strict=True)):
        earlier = before.input_ids[row, : before.lengths[row]].tolist()
        text = earlier + ids[:length]
        for start in range(len(earlier), len(text), width):
            first, stop = max(0, start - context), min(start + width, len(text))
            windows.append(text[first:stop])
            cut.append(stop - start == width)
            places.append((row, start - len(earlier), start - first))
    found = torch.zeros_like(rows.input_ids, dtype=torch.bool)
    for (row, start, skipped), mask in zip(places, model.write_filter(windows, cut), strict=True):
        own = _with_taps(torch.tensor(mask, dtype=torch.bool), taps)[skipped:]
        found[row, start : start + len(own)] = own
    return found


def _with_taps(found: Bool[Tensor, " tokens"], taps: int) -> Bool[Tensor, " tokens"]:
    """Also the `taps` tokens behind each."""
    wider = found
    for tap in range(1, min(taps, len(found) - 1) + 1):
        wider = wider | torch.nn.functional.pad(found[:-tap], (tap, 0))
    return wider
