"""Taking writes back: by source, by position, or because their time is over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool
from torch import Tensor

from cortex_core.backbone.segments import Rows, Tags
from cortex_core.backbone.session import Session
from cortex_core.backbone.write_log import WriteLog
from cortex_core.errors import ConfigError

if TYPE_CHECKING:
    from cortex_core.backbone.model import Cortex


@torch.no_grad()
def forget(
    model: Cortex,
    session: Session,
    source: str | None,
    positions: tuple[int, int] | None,
    rows: Sequence[int] | None,
) -> int:
    """`Cortex.forget`."""
    log = session.log
    if log is None:
        raise ConfigError("forget: this session keeps no log of its writes; open it with new_session(log_writes=…)")
    if source is None and positions is None:
        raise ConfigError("forget: say what, with source=… or positions=(first, stop), or reset() the session")
    chosen = _rows(session, rows)
    number = _number(log, source)
    _check_folded(log, chosen, source, number, positions)
    gone = {}
    for layer, entries in log.layers.items():
        gone[layer] = chosen[:, None] & _matches(entries.sources, entries.positions, number, positions) & entries.valid
    count = sum(int(lost.sum()) for lost in gone.values())
    session.log, session.states = log.without(gone, model.sidecars_by_layer, session.states, session.start_tokens)
    opened = session.open_rows
    assert opened.tags is not None
    places = session.start_tokens[:, None] + torch.arange(opened.input_ids.shape[1], device=chosen.device)
    silent = chosen[:, None] & opened.valid & _matches(opened.tags.source, places, number, positions)
    session.open_rows = opened._replace(tags=opened.tags._replace(silent=opened.tags.silent | silent))
    return count


def expired(log: WriteLog, rows: Bool[Tensor, " batch"], position: Tensor) -> dict[int, Bool[Tensor, "batch writes"]]:
    """Per layer, the writes of these rows whose time is over at `position` [batch]."""
    return {n: rows[:, None] & (entries.expires <= position[:, None]) for n, entries in log.layers.items()}


def tagged(session: Session, rows: Rows, source: str | None, ttl_tokens: int | None) -> Rows:
    """`rows`, about to be read into the session, with where they come from and how long they may stay.

    Raises ConfigError for either without a log, or for no time at all.
    """
    for name, value in (("source", source), ("ttl_tokens", ttl_tokens)):
        if value is not None and session.log is None:
            raise ConfigError(f"{name} = {value!r}: this session keeps no log of its writes; new_session(log_writes=…)")
    if session.log is None or (source is None and ttl_tokens is None):
        return rows
    if ttl_tokens is not None and ttl_tokens < 1:
        raise ConfigError(f"ttl_tokens = {ttl_tokens}: at least 1, or a write filter for what must not be kept at all")
    tags = Tags.of(rows.input_ids)
    if source is not None:
        session.log, number = session.log.named(source)
        tags = tags._replace(source=torch.full_like(tags.source, number))
    if ttl_tokens is not None:
        offsets = torch.arange(rows.input_ids.shape[1], device=rows.input_ids.device)
        tags = tags._replace(expires=session.num_tokens[:, None] + offsets + ttl_tokens)
    return rows._replace(tags=tags)


def _matches(sources: Tensor, places: Tensor, number: int | None, positions: tuple[int, int] | None) -> Tensor:
    found = torch.ones_like(places, dtype=torch.bool)
    if number is not None:
        found = found & (sources == number)
    if positions is not None:
        found = found & (places >= positions[0]) & (places < positions[1])
    return found


def _rows(session: Session, rows: Sequence[int] | None) -> Bool[Tensor, " batch"]:
    batch, device = session.batch_size, session.start_tokens.device
    wrong = [row for row in rows or () if not 0 <= row < batch]
    if wrong:
        raise ConfigError(f"forget: rows = {list(rows or ())}: the session has rows 0 to {batch - 1}")
    chosen = torch.full((batch,), rows is None, device=device)
    chosen[list(rows or ())] = True
    return chosen


def _number(log: WriteLog, source: str | None) -> int | None:
    if source is None:
        return None
    if source not in log.labels:
        known = f"{len(log.labels)} others were" if log.labels else "none was"
        raise ConfigError(f"forget: source = {source!r} was never read into this session; {known}")
    return log.labels.index(source)


def _check_folded(
    log: WriteLog, chosen: Tensor, source: str | None, number: int | None, positions: tuple[int, int] | None
) -> None:
    """What has left the log cannot be taken back, and must not seem to be."""
    start = max(int(entries.start[chosen].max()) if bool(chosen.any()) else 0 for entries in log.layers.values())
    early = positions is None or positions[0] < start
    if (number is None or bool(log.folded[chosen, number].any())) and early and start > 0:
        what = f"positions = {positions}" if source is None else f"source = {source!r}"
        raise ConfigError(
            f"forget: {what}: writes before position {start} have left the log of {log.capacity} and can no longer be "
            "taken back one by one. Take back later ones, reset() the session, or open it with more log_writes"
        )
