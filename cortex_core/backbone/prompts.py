"""Questions side by side: what a model says comes next after each of many prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cortex_core.backbone.model import Cortex
from cortex_core.backbone.reading import advance
from cortex_core.backbone.segments import checked_rows
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
    if not model.memory_is_on:
        logits = continuations(model, prompts)
        return logits[torch.arange(len(logits), device=logits.device), prompts.lengths.to(logits.device) - 1]
    reader, ids, mask = _given(model, prompts, session)
    rows, _ = checked_rows(ids, mask, None, len(ids))
    return advance(model, reader, rows, keep=torch.ones_like(rows.lengths))[0][:, 0]


def continuations(
    model: Cortex, prompts: Prompts, session: Session | None = None
) -> Float[Tensor, "prompts width vocab"]:
    """Likewise, after each token of each prompt; without meaning at padding."""
    reader, ids, mask = _given(model, prompts, session)
    logits = model(input_ids=ids, attention_mask=mask, session=reader).logits
    assert logits is not None
    return logits


def _given(model: Cortex, prompts: Prompts, session: Session | None) -> tuple[Session, Tensor, Tensor]:
    """A reader per prompt; the tokens and the attention mask [prompts, width], where the model is."""
    ids, lengths = (part.to(model.backbone.device) for part in prompts)
    reader = model.new_session(len(prompts)) if session is None else session.repeated(len(prompts))
    return reader, ids, (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
