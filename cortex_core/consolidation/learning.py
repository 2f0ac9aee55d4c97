"""How a night learns, wherever it learns: what it takes from a lesson, what makes its steps, and at what pace.

The settings are those of `NightConfig`; slow weights and low-rank deltas of the backbone share all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from cortex_core.backbone.model import Cortex
from cortex_core.backbone.prompts import Prompts, answers, continuations
from cortex_core.config import NightConfig, UpdateConfig
from cortex_core.consolidation.lessons import Lessons
from cortex_core.errors import ConfigError
from cortex_core.optim.groups import build_optimizer
from cortex_core.optim.row_momentum import RowMomentum

BETAS = (0.9, 0.98)
LearningAt = Callable[[Tensor], AbstractContextManager[None]]
"""Within it, what is learned takes gradients only through what it adds at the tokens of a mask [prompts, width]."""


# --- losses ----------------------------------------------------------------------------------------------------------


def lesson_losses(model: Cortex, lessons: Lessons, gradient: str, learning_at: LearningAt) -> Float[Tensor, " prompts"]:
    """What each lesson says to a model with empty fast weights, as `NightConfig.gradient` has it.

    `all_tokens` is the mean over a question's tokens, of which the answer is one: KL there, cross-entropy elsewhere.
    """
    prompts = lessons.prompts
    if gradient == "answer":
        return lessons.taught.kl(answers(model, prompts))
    if gradient == "answer_context_frozen":
        with learning_at(_last_tokens(model, prompts)):
            return lessons.taught.kl(answers(model, prompts))
    logits = continuations(model, prompts)
    ids, lengths = (part.to(logits.device) for part in prompts)
    answered = lessons.taught.kl(logits[torch.arange(len(prompts), device=logits.device), lengths - 1])
    read = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    inside = torch.arange(1, ids.shape[1], device=ids.device) < lengths[:, None]
    return (answered + (read.view_as(inside) * inside).sum(1)) / lengths


def text_loss(model: Cortex, windows: Int[Tensor, "windows width"]) -> Float[Tensor, ""]:
    """Next-token loss on ordinary text, mean over its tokens."""
    ids = windows.to(model.backbone.device)
    logits = model(input_ids=ids).logits
    assert logits is not None
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def _last_tokens(model: Cortex, prompts: Prompts) -> Bool[Tensor, "prompts width"]:
    """Where the answers come from. Of calls that read whole rows at once, which no longer ones are."""
    width = int(prompts.lengths.max())
    if width > model.segment_tokens:
        raise ConfigError(
            f'sleep.gradient = "answer_context_frozen": a question has {width} tokens, and can have at most '
            f"{model.segment_tokens}, the segment that attention sees. Ask shorter ones, or set it to answer"
        )
    return (torch.arange(width) == prompts.lengths[:, None] - 1).to(model.backbone.device)


@contextmanager
def slow_learning_at(model: Cortex, tokens: Bool[Tensor, "prompts width"]) -> Iterator[None]:
    """`LearningAt` of the slow weights: what is read from them at all other tokens is a constant."""

    def held(tokens: Tensor, module: nn.Module, inputs: tuple[Any, ...], read: Tensor) -> Tensor:
        return torch.where(tokens[:, None, :, None], read, read.detach())

    with ExitStack() as hooks:
        for sidecar in model.sidecars_by_layer.values():
            if sidecar.slow is not None:
                hooks.callback(sidecar.slow.register_forward_hook(partial(held, tokens)).remove)
        yield


# --- steps -----------------------------------------------------------------------------------------------------------


def optimizer_of(
    values: Mapping[str, Tensor], night: NightConfig, rate: float, usual: Callable[..., torch.optim.Optimizer]
) -> torch.optim.Optimizer:
    """What `NightConfig.optimizer` names, over these values; `usual(values, lr=…, betas=…)` where it names nothing."""
    if night.optimizer is None:
        return usual(list(values.values()), lr=rate, betas=BETAS)
    if night.optimizer == "row_momentum":
        return RowMomentum(values.values(), rate, BETAS)
    groups = [{"params": list(values.values()), "lr": rate}]
    update = UpdateConfig(name=night.optimizer)
    return build_optimizer(values, groups, update, betas=BETAS, weight_decay=0.0)


class Pace:
    """Warm-up, and the average over the weights of one night."""

    def __init__(self, values: Mapping[str, Tensor], night: NightConfig) -> None:
        self._values, self._night, self._steps = values, night, 0
        self._average = {name: torch.zeros_like(value) for name, value in values.items()} if night.ema_decay else {}

    def factor(self, step: int) -> float:
        """Of the learning rate, in a step, from 1."""
        return min(1.0, step / self._night.warmup_steps) if self._night.warmup_steps else 1.0

    @torch.no_grad()
    def stepped(self) -> None:
        """A step has been made, and counts."""
        self._steps += 1
        for name, average in self._average.items():
            average.lerp_(self._values[name], 1 - self._night.ema_decay)

    @torch.no_grad()
    def end(self) -> None:
        """Give the values their average; it has no memory of where they began, and after one step is where they are."""
        if self._steps:
            for name, average in self._average.items():
                self._values[name].copy_(average / (1 - self._night.ema_decay**self._steps))
