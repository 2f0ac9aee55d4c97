"""Where slow weights will be asked: their addresses are fitted before the first night, to the questions of sleep and to
the same tokens in other text. What is read is compared with what they hold: a token must find it there too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cortex_core.backbone.model import Cortex

CUES = 512
"""Tokens that are asked for."""
LEADS, UNASKED_LEADS = (0, 0, 0, 2, 8, 20, 40, 80), (1, 2, 3, 4, 8, 20, 40, 80)
"""How many others stand before each question, in turn, and before a token that nothing asks about."""
_ROWS = 64  # questions per call of the backbone


@torch.no_grad()
def spread_addresses(model: Cortex, questions: Sequence[Sequence[int]]) -> None:
    """`SlowWeights.fit` in all layers: to random tokens behind random tokens, with these questions (token ids, without
    the cue) between them and without. Needs no text, and draws the same every time.

    For slow weights that hold nothing. Under sharding every worker must call it, with the same questions. Nothing is
    done if no question has room in a segment.
    """
    questions = [words for words in questions if len(words) < model.segment_tokens]
    if not questions:
        return
    generator = torch.Generator().manual_seed(CUES)
    vocab_size = model.backbone.config.get_text_config().vocab_size
    cues = torch.randperm(vocab_size, generator=generator)[:CUES, None]
    contexts: list[tuple[Sequence[int], int]] = [
        (questions[number % len(questions)], LEADS[number % len(LEADS)])
        for number in range(max(len(LEADS), len(questions)))
    ]
    asked: list[list[Tensor]] = []
    for spoken, lead_tokens in [*contexts, *(((), tokens) for tokens in UNASKED_LEADS)]:
        words = torch.tensor(spoken, dtype=torch.long).expand(len(cues), -1)
        most = min(lead_tokens, model.segment_tokens - words.shape[1] - 1)
        lead = torch.randint(vocab_size, (len(cues), most), generator=generator)
        asked.append(_queries(model, torch.cat([lead, words, cues], dim=1)))
    for layer, sidecar in enumerate(model.sidecars_by_layer.values()):
        if sidecar.slow is not None:
            sidecar.slow.fit(torch.stack([context[layer] for context in asked]))


def fitted(model: Cortex) -> dict[str, Tensor]:
    """What the fit has set, by name: the slow weights mean nothing without it. The tensors themselves."""
    return {
        f"{layer}.slow.{name}": getattr(sidecar.slow, name)
        for layer, sidecar in model.sidecars_by_layer.items()
        if sidecar.slow is not None
        for name in ("centre", "spread")
    }


def unfitted(model: Cortex) -> dict[str, Tensor]:
    """The same, of slow weights that were never fitted: addresses stay what they are."""
    return {
        name: torch.eye(len(value)).to(value) if value.dim() == 2 else torch.zeros_like(value)
        for name, value in fitted(model).items()
    }


def _queries(model: Cortex, rows: Tensor) -> list[Tensor]:
    """For each layer, the address [rows, heads, rank] under which each row's last token is looked up. Only the layers
    up to the last memory run, and slow weights are not read: they hold nothing yet."""
    sidecars = list(model.sidecars_by_layer.values())
    found: list[list[Tensor]] = [[] for _ in sidecars]
    current: dict[nn.Module, Tensor] = {}

    def keep(
        module: nn.Module, inputs: tuple[Any, ...], options: dict[str, bool], result: tuple[Tensor, Tensor]
    ) -> None:
        _, queries = result if options["read"] else module.forward(*inputs, read=True)
        current[module] = queries[:, :, -1]

    hooks = [sidecar.addresses.register_forward_hook(keep, with_kwargs=True) for sidecar in sidecars]
    slow = [sidecar.slow for sidecar in sidecars]
    try:
        for sidecar in sidecars:
            sidecar.slow = None
        for part in rows.split(_ROWS):
            model.read(part.to(model.backbone.device), model.new_session(len(part)))
            for layer, sidecar in enumerate(sidecars):
                found[layer].append(current[sidecar.addresses].clone())
    finally:
        for hook in hooks:
            hook.remove()
        for sidecar, weights in zip(sidecars, slow, strict=True):
            sidecar.slow = weights
    return [torch.cat(parts) for parts in found]
