"""Reading segments: many per backbone call, long inputs block by block, the state handed on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cortex_core.backbone.attention import attention_pass, only_at
from cortex_core.backbone.forgetting import expired
from cortex_core.backbone.passes import GatePass, MemoryPass, States
from cortex_core.backbone.segments import Layout, Rows, Tags
from cortex_core.backbone.session import Session
from cortex_core.backbone.silence import context_after, silent_tokens
from cortex_core.fast_weights.state import FastWeights

if TYPE_CHECKING:
    from cortex_core.backbone.model import Cortex

BLOCK_TOKENS = 16_384
"""Tokens per backbone call when a call reads more: bounds memory, large enough to keep the processor busy."""


@dataclass(frozen=True)
class CortexOutput:
    """Result of a call."""

    logits: Float[Tensor, "batch tokens vocab"] | None
    """For each new token (or the last `logits_to_keep`), what comes next. At padding: no meaning. None after `read`."""
    metrics: dict[str, float]
    """`memory/write_frac`, `memory/surprise`: means over layers and the tokens of the last backbone call, the open
    segment's earlier tokens among them; `memory/state_norm`: after it, mean over layers. Empty with the memory off."""


def read_segments(
    model: Cortex,
    input_ids: Int[Tensor, "batch segments width"],
    layout: Layout,
    states: States,
    *,
    predict: bool | Bool[Tensor, "batch segments width"],
    snapshot_segment: Int[Tensor, " batch"] | None = None,
    log: bool = False,
    read_strength: float = 1.0,
) -> tuple[Tensor | None, MemoryPass]:
    """One backbone call over all segments of all rows.

    `predict` says where logits are wanted: everywhere ([batch, tokens, vocab]), at the positions of a mask ([wanted,
    vocab]) or nowhere (None), in which case only the layers up to the last memory run.
    """
    batch, segments, width = input_ids.shape
    flat = input_ids.reshape(batch * segments, width)
    nowhere = predict is False
    memory = model.listen(
        layout, states, snapshot_segment=snapshot_segment, read_last=not nowhere, log=log, read_strength=read_strength
    )
    mask = None if bool(layout.valid.all()) else layout.valid.long()
    with attention_pass(memory):
        if nowhere:
            model.reader(input_ids=flat, attention_mask=mask, use_cache=False)
            return None, memory
        wanted = predict.reshape(flat.shape) if isinstance(predict, Tensor) else None
        with only_at(wanted):
            logits = model.backbone(input_ids=flat, attention_mask=mask, use_cache=False).logits
    return logits[0] if wanted is not None else logits.view(batch, segments * width, -1), memory


def gate_activations(
    model: Cortex, input_ids: Int[Tensor, "batch segments width"], start: int, states: States
) -> dict[int, Float[Tensor, "batch heads tokens"]]:
    """Per layer, how near the write gates are to opening in segments that begin at position `start`.

    Nothing is written, and nothing is added to the backbone's own attention: exact for text in which no gate opens.
    """
    memory = GatePass(model.ports, states, Layout.plain(input_ids, start))
    with attention_pass(memory):
        model.reader(input_ids=input_ids.flatten(0, 1), use_cache=False)
    return memory.activations


def advance(
    model: Cortex, session: Session, new: Rows, keep: Int[Tensor, " batch"]
) -> tuple[Float[Tensor, "batch kept vocab"], dict[str, float]]:
    """Read `new` into the session. Returns the logits of the last `keep` tokens of each row (padded right) and metrics.

    The open segment is read again from its start, so that the result does not depend on how an input is split. A full
    segment stays open until a token follows it. The session changes once all is read, or not at all.
    """
    rows = session.open_rows.then(new)
    width = model.segment_tokens
    closed = ((rows.lengths - 1) // width).clamp_min(0)
    segments = max(1, -(-rows.input_ids.shape[1] // width))
    padded = rows.to_width(segments * width if segments > 1 else max(1, rows.input_ids.shape[1]))
    silent = silent_tokens(model, session, padded)
    place = torch.arange(padded.input_ids.shape[1], device=keep.device)
    asked = (place >= (rows.lengths - keep)[:, None]) & (place < rows.lengths[:, None])
    block = max(1, BLOCK_TOKENS // (session.batch_size * width))
    states, boundary, log = session.states, session.states, session.log
    kept, last_pass = [], None
    first = 0
    while first < segments:
        count = min(block, segments - first)
        if log is not None:  # a block ends where something expires
            count = min(count, log.until_expiry(padded, session.start_tokens, width, first) - first)
        wanted = asked[:, first * width : (first + count) * width]
        logits, last_pass = _read_block(model, padded, silent, session, states, first, count, closed, wanted)
        states = last_pass.final
        boundary = {n: FastWeights.where(closed >= first, last_pass.snapshots[n], boundary[n]) for n in boundary}
        if logits is not None:
            kept.append((wanted, logits))
        if log is not None:
            log, states = _logged(model, log, last_pass, padded, session, first, count, closed)
        first += count
    session.states = {layer: state.detach() for layer, state in boundary.items()}
    session.log = log
    session.before = context_after(model, session, rows, closed * width)
    session.open_rows = rows.after(closed * width)
    session.start_tokens = session.start_tokens + closed * width
    assert last_pass is not None
    return _kept_logits(kept, keep, model), metrics_of(last_pass)


def _read_block(model, padded, silent, session, states, first, count, closed, wanted):  # noqa: ANN001, ANN202
    width = min(model.segment_tokens, padded.input_ids.shape[1])
    now = slice(first * width, (first + count) * width)
    flat = (session.batch_size * count, width)
    layout = Layout(
        count,
        padded.valid[:, now].reshape(flat),
        session.start_tokens + first * width,
        padded.reward[:, now].reshape(flat),
        None if silent is None else silent[:, now].reshape(flat),
        left_padded=False,
    )
    ids, log = padded.input_ids[:, now].view(session.batch_size, count, width), session.log is not None
    asked = int(wanted.sum())
    predict = asked > 0 if asked in (0, wanted.numel()) else wanted.reshape(ids.shape)
    logits, memory = read_segments(
        model, ids, layout, states, predict=predict, snapshot_segment=closed - first, log=log
    )
    return None if logits is None else logits.view(asked, -1), memory


def _logged(model, log, memory, padded, session, first, count, closed):  # noqa: ANN001, ANN202
    """The log with what the block has written, and the states after it without what expires where it ends."""
    width = min(model.segment_tokens, padded.input_ids.shape[1])
    place = torch.arange(first * width, (first + count) * width, device=closed.device)
    rows = Rows(
        padded.input_ids[:, place], padded.reward[:, place], (padded.lengths - first * width).clamp(0, count * width),
        Tags(*(part[:, place] for part in padded.tags)),
    )  # fmt: skip
    written = {layer: reading.written for layer, reading in memory.readings.items()}
    log = log.extended(written, rows, place < (closed * width)[:, None], session.start_tokens[:, None] + place)
    end = session.start_tokens + (first + count) * width
    gone = expired(log, closed >= first + count, end)
    log, states = log.without(gone, model.sidecars_by_layer, memory.final, end)
    return log.fitted(model.sidecars_by_layer), states


def _kept_logits(kept: list[tuple[Tensor, Tensor]], keep: Tensor, model: Cortex) -> Tensor:
    """Logits [batch, kept, vocab] from those of each block at the positions of its mask [batch, block]."""
    widest = int(keep.max())
    if not kept or widest == 0:
        vocab = model.backbone.config.get_text_config().vocab_size
        return torch.zeros(len(keep), widest, vocab, device=keep.device)
    if all((wanted == wanted[0]).all() for wanted, _ in kept):  # nothing to put back; logits are large
        rows = [logits.view(len(keep), -1, logits.shape[-1]) for _, logits in kept]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
    out = kept[0][1].new_zeros(len(keep), widest, kept[0][1].shape[-1])
    found = torch.zeros_like(keep)
    for wanted, logits in kept:
        row = wanted.nonzero()[:, 0]
        out[row, (found[:, None] + wanted.cumsum(1) - 1)[wanted]] = logits
        found = found + wanted.sum(1)
    return out


def metrics_of(memory: MemoryPass) -> dict[str, float]:
    """Means over tokens, heads and layers of one pass."""
    valid = memory.layout.to_sequences(memory.layout.valid)[:, None]
    count = valid.sum() * len(memory.readings) * next(iter(memory.readings.values())).write.shape[1]
    readings = memory.readings.values()
    return {
        "memory/write_frac": float(sum(((r.write > 0) & valid).sum() for r in readings) / count.clamp_min(1)),
        "memory/surprise": float(sum((r.surprise * valid).sum() for r in readings) / count.clamp_min(1)),
        "memory/state_norm": float(
            sum(r.final_state.up.detach().norm(dim=(-2, -1)).mean() for r in readings) / len(memory.readings)
        ),
    }
