"""Questions side by side: what a model says comes next after each of many prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cortex_core.backbone.model import Cortex
from cortex_core.backbone.session import Session


class Prompts(NamedTuple):
    """Ragged rows of tokens, padded on the right; what comes after the last one of each is asked for."""

    input_ids: Int[Tensor, "prompts width"]
    lengths: Int[Tensor, " prompts"]

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Prompts:
        """From token ids, in this order."""
        ids = torch.zeros(len(rows), max(map(len, rows), default=0), dtype=torch.long)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.as_tensor(tokens)
        return cls(ids, torch.tensor([len(row) for row in rows], dtype=torch.long))

    def __len__(self) -> int:  # type: ignore[override]
        return len(self.lengths)

    def split(self, size: int) -> list[Prompts]:
        """Parts of at most `size` prompts."""
        return [Prompts(*parts) for parts in zip(*(part.split(size) for part in self), strict=True)]


def answers(model: Cortex, prompts: Prompts, session: Session | None = None) -> Float[Tensor, "prompts vocab"]:
    """Logits of what comes after each prompt; of the model with what the one row of `session` holds, or with fast
    weights that hold nothing. The session stays as it is."""
    logits = continuations(model, prompts, session)
    return logits[torch.arange(len(prompts), device=logits.device), prompts.lengths.to(logits.device) - 1]


def continuations(
    model: Cortex, prompts: Prompts, session: Session | None = None
) -> Float[Tensor, "prompts width vocab"]:
    """Likewise, after each token of each prompt; without meaning at padding."""
    device = model.backbone.device
    ids, lengths = (part.to(device) for part in prompts)
    reader = model.new_session(len(prompts)) if session is None else session.repeated(len(prompts))
    mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    logits = model(input_ids=ids, attention_mask=mask.long(), session=reader).logits
    assert logits is not None
    return logits
