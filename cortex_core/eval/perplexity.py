"""Drift: what the memory costs on plain text. Held-out text, the same segments with memory on and off."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from cortex_core.backbone.model import Cortex
from cortex_core.intervals import mean_interval


class TextLoss(NamedTuple):
    """Mean next-token loss of each row, nats per token, float64 [rows]."""

    with_memory: Float[Tensor, " rows"]
    bare: Float[Tensor, " rows"]


@torch.no_grad()
def text_loss(
    model: Cortex, text: Int[Tensor, "rows tokens"], before: Int[Tensor, "rows context"] | None = None
) -> TextLoss:
    """Loss on `text`, read segment by segment; the first token of each segment is not scored, for either.

    `before` is read into the memory first (facts that it holds while it reads on), and not scored; it is repeated to
    whole segments.
    """
    width = model.segment_tokens
    text = text[:, : text.shape[1] // width * width]
    session = model.new_session(len(text))
    if before is not None and before.shape[1]:
        whole = -(-before.shape[1] // width) * width  # so that the text begins with a segment, as for the bare model
        model.read(before.repeat(1, -(-whole // before.shape[1]))[:, -whole:], session)
    segments = text.view(len(text), -1, width)
    losses: dict[str, list[Tensor]] = {"on": [], "off": []}
    for number in range(segments.shape[1]):
        ids = segments[:, number]
        losses["on"].append(_loss(model(input_ids=ids, session=session).logits, ids))
        with model.memory(False):
            losses["off"].append(_loss(model(input_ids=ids).logits, ids))
    return TextLoss(torch.stack(losses["on"], 1).mean(1), torch.stack(losses["off"], 1).mean(1))


def _loss(logits: Tensor | None, ids: Tensor) -> Tensor:
    assert logits is not None
    flat = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return flat.view(len(ids), -1).double().mean(1)


def drift(losses: TextLoss, bytes_per_token: float) -> dict[str, float]:
    """Perplexities, their ratio with a 95 % interval over rows, and bits per byte."""
    difference = (losses.with_memory - losses.bare).tolist()
    mean = sum(difference) / len(difference)
    low, high, _ = mean_interval(difference) if len(difference) > 1 else (math.nan, math.nan, mean)
    on, off = float(losses.with_memory.mean()), float(losses.bare.mean())
    return {
        "perplexity_on": math.exp(on),
        "perplexity_off": math.exp(off),
        "ratio": math.exp(mean),
        "low": math.exp(low),
        "high": math.exp(high),
        "bits_per_byte_on": on / math.log(2) / bytes_per_token,
        "bits_per_byte_off": off / math.log(2) / bytes_per_token,
    }
