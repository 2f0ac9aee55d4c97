"""Decoding many prompts at once, such that what a prompt gets does not depend on the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from cortex_core.backbone.model import Cortex
from cortex_core.backbone.session import Session
from cortex_core.dreaming.memories import Tokens


class Decoded(NamedTuple):
    """What came after one prompt."""

    tokens: Tokens
    nats: tuple[float, ...]
    """Log-probability of each, at temperature 1, among all tokens but that of the end of a sequence."""
    margins: tuple[float, ...]
    """Log-probability of each over that of the likeliest other; below 0 where that was likelier."""

    def first(self, count: int) -> Decoded:
        """Its first tokens."""
        return Decoded(self.tokens[:count], self.nats[:count], self.margins[:count])


class _Choice:
    """Chooses each row's token and says why, in the place of a logits processor: `generate` takes the likeliest, and
    this leaves it one."""

    def __init__(self, draws: Float[Tensor, "rows steps"] | None, temperature: float, top_p: float) -> None:
        self.draws, self.temperature, self.top_p = draws, temperature, top_p
        self.nats: list[Tensor] = []
        self.margins: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
        nats = scores.float().log_softmax(-1)
        best = nats.topk(2, dim=-1)
        chosen = best.indices[:, 0] if self.draws is None else self._drawn(scores)
        said = nats.gather(1, chosen[:, None])[:, 0]
        other = torch.where(chosen == best.indices[:, 0], best.values[:, 1], best.values[:, 0])
        self.nats.append(said)
        self.margins.append(said - other)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)

    def _drawn(self, scores: Float[Tensor, "rows vocab"]) -> Int[Tensor, " rows"]:
        """By the inverse of the cumulative distribution, likeliest first: one number per row and step is all that
        chance decides, whatever the device."""
        assert self.draws is not None
        chances, ids = (scores.double() / self.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
        running = chances.cumsum(-1)
        inside = (running - chances) < self.top_p  # the likeliest is always inside
        total = (chances * inside).sum(-1, keepdim=True)
        draw = self.draws[:, len(self.nats), None].to(total) * total
        rank = torch.minimum((running <= draw).sum(-1), inside.sum(-1) - 1)
        return ids.gather(1, rank[:, None])[:, 0]


@torch.no_grad()
def decode(
    model: Cortex,
    prompts: Sequence[Tokens],
    count: int,
    session: Session | None = None,
    draws: NDArray[np.float64] | None = None,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> list[Decoded]:
    """`count` tokens after each prompt: the likeliest, or sampled with `draws` [prompts, count] from [0, 1).

    The model has what the one row of `session` holds, or fast weights that hold nothing; the session stays as it is.
    No row ends early: the end-of-sequence token is not decoded.
    """
    if not prompts or not count:
        return [Decoded((), (), ())] * len(prompts)
    device = model.backbone.device
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
        mask[row, : len(prompt)] = 1
    choice = _Choice(None if draws is None else torch.from_numpy(draws), temperature, top_p)
    out = model.generate(
        ids.to(device),
        None if session is None else session.repeated(len(prompts)),
        attention_mask=mask.to(device),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        repetition_penalty=1.0,  # whatever the model's own default
        logits_processor=[choice],
    )
    tokens = out[:, width:].tolist()
    nats, margins = (torch.stack(part, dim=1).tolist() for part in (choice.nats, choice.margins))
    rows = zip(tokens, nats, margins, strict=True)
    return [Decoded(tuple(said), tuple(sure), tuple(over)) for said, sure, over in rows]
