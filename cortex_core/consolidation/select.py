"""Which modules of the backbone to unfreeze: where lessons pull hardest and text suffers least.

A delta starts at B = 0, and the gradient there is scale · (∂L/∂y) (A x)ᵀ: the gradient of the weight itself, seen
through the random rows of A. Its squares are a sketch of the weight's Fisher information, at rank / inputs of the cost,
and in the very directions that can be learned.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Generator, Tensor

from cortex_core.backbone.low_rank import LowRankDeltas, linear_modules
from cortex_core.backbone.model import Cortex
from cortex_core.backbone.prompts import answers
from cortex_core.config import UnfreezeConfig
from cortex_core.consolidation.lessons import Lessons
from cortex_core.consolidation.sleep import trained
from cortex_core.errors import ConfigError


class Candidate(NamedTuple):
    """One module that might be unfrozen. Numbers are traces over its B at 0."""

    module: str
    lessons: float
    """Mean over lessons of the squared gradient of the loss: how fast it would learn."""
    text: float
    """Fisher information per token of text: twice the KL per token that a unit step would cost, at first."""
    ratio: float
    """What is learned per damage."""
    chosen: bool


def candidates(
    model: Cortex, lessons: Lessons, text: Int[Tensor, "windows width"], config: UnfreezeConfig
) -> list[Candidate]:
    """All modules that `config` allows, best ratio first; of equals, the name that comes first. The best are chosen.

    `text`: windows no longer than a segment that have nothing to do with the lessons, and are not the guard's. The
    model stays as it is. Raises ConfigError without lessons or text, or for patterns that match nothing.
    """
    if not len(lessons) or not text.numel():
        raise ConfigError(f"unfreeze: {len(lessons)} lessons and {text.numel()} tokens of text: give some of both")
    layers = None if config.layers == "all" else config.layers
    names = linear_modules(model.backbone, config.modules, layers)
    deltas = LowRankDeltas(model.backbone, names, config.rank, config.scale, config.seed)
    with deltas.attached(model):
        gains = [total / len(lessons) for total in _squared_gradients(deltas, _lesson_losses(model, lessons))]
        costs = [total / text.numel() for total in _squared_gradients(deltas, _text_losses(model, text, config.seed))]
    rows = [
        (name, gain, cost, gain / max(cost, sys.float_info.min))
        for name, gain, cost in zip(names, gains, costs, strict=True)
    ]
    rows.sort(key=lambda row: (-row[3], row[0]))
    return [Candidate(*row, chosen=place < config.num_modules) for place, row in enumerate(rows)]


def chosen_deltas(model: Cortex, found: Sequence[Candidate], config: UnfreezeConfig) -> LowRankDeltas:
    """New deltas for the chosen modules, in the order of the model, not attached yet."""
    names = {candidate.module for candidate in found if candidate.chosen}
    ordered = [name for name, _ in model.backbone.named_modules() if name in names]
    return LowRankDeltas(model.backbone, ordered, config.rank, config.scale, config.seed)


def table(found: Sequence[Candidate]) -> str:
    """For people: one line per module, those that are chosen with a star."""
    width = max((len(candidate.module) for candidate in found), default=6)
    lines = [f"  {'module':<{width}}  {'lessons':>9}  {'text':>9}  {'ratio':>9}"]
    for row in found:
        star = "*" if row.chosen else " "
        lines.append(f"{star} {row.module:<{width}}  {row.lessons:9.3g}  {row.text:9.3g}  {row.ratio:9.3g}")
    return "\n".join(lines)


def _lesson_losses(model: Cortex, lessons: Lessons) -> Iterator[Tensor]:
    """The distillation loss of each: what is right already pulls at nothing."""
    for row in range(len(lessons)):
        one = lessons.at(torch.tensor([row]))
        yield one.taught.kl(answers(model, one.prompts)).sum()


def _text_losses(model: Cortex, text: Tensor, seed: int) -> Iterator[Tensor]:
    """Of labels that are drawn from the model itself, per window: the true Fisher matrix, the curvature of its KL."""
    generator = Generator().manual_seed(seed)
    for window in text.to(model.backbone.device):
        logits = model(input_ids=window[None]).logits
        assert logits is not None
        nats = logits[0].float().log_softmax(-1)
        drawn = torch.multinomial(nats.detach().exp().cpu(), 1, generator=generator)
        yield -nats.gather(1, drawn.to(nats.device)).sum()


def _squared_gradients(deltas: LowRankDeltas, losses: Iterator[Tensor]) -> list[float]:
    """Summed over the entries of each B and over examples, each of which has a gradient of its own."""
    ups = {name: value for name, value in deltas.values().items() if name.startswith("up.")}
    sums = [0.0] * len(ups)
    with trained(ups):
        for loss in losses:
            gradients = torch.autograd.grad(loss, list(ups.values()), materialize_grads=True)
            sums = [total + float(found.square().sum()) for total, found in zip(sums, gradients, strict=True)]
    return sums
