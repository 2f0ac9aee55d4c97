"""Sleep: what the fast weights hold becomes slow weights, until the model answers without them as it did with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from cortex_core.backbone.model import Cortex
from cortex_core.config import ScalingConfig, SleepConfig
from cortex_core.consolidation.learning import (
    LearningAt,
    Pace,
    lesson_losses,
    optimizer_of,
    slow_learning_at,
    text_loss,
)
from cortex_core.consolidation.lessons import Lessons
from cortex_core.consolidation.scaling import scaled
from cortex_core.errors import DataError
from cortex_core.optim.row_momentum import RowMomentum

SlowValues = Mapping[str, Tensor]
"""The slow weights of all memories, by name; what sleep changes, and nothing else."""


class Held(NamedTuple):
    """What holds slow weights where they are: an elastic penalty, sum of importance / 2 x (value - anchor)^2."""

    importance: Mapping[str, Tensor]
    """By name of the slow weights. Not negative."""
    anchor: Mapping[str, Tensor]

    def penalty(self, values: SlowValues) -> Tensor:
        """To be added to a loss."""
        parts = [(self.importance[n] * (value - self.anchor[n]).square()).sum() for n, value in values.items()]
        return 0.5 * torch.stack(parts).sum()


class Evening(NamedTuple):
    """All that a night needs but the model: it can be slept elsewhere, later, and again."""

    tonight: Lessons
    """What the day has to teach; not empty."""
    replayed: Sequence[Lessons]
    """Old lessons for each step of the night; some or all may be empty."""
    text: Int[Tensor, "steps windows width"] | None = None
    """Ordinary text for each step, if any is mixed in."""
    held: Held | None = None
    """What earlier nights have learned that may not be moved freely."""

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, on the CPU, as a file or an actor takes it."""
        parts = {"tonight": self.tonight} | {f"step{step:04d}": old for step, old in enumerate(self.replayed)}
        named = {
            f"{part}.{name}": value for part, lessons in parts.items() for name, value in lessons.tensors().items()
        }
        named |= {} if self.text is None else {"text.windows": self.text}
        for part, of in self.held._asdict().items() if self.held else ():
            named |= {f"{part}.{name}": value for name, value in of.items()}
        return {name: value.detach().cpu() for name, value in named.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], device: torch.device) -> Evening:
        """What `tensors` gave, to be learned on `device`. Raises DataError for anything else."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            part, _, field = name.partition(".")
            parts.setdefault(part, {})[field] = value.to(device)
        if "tonight" not in parts:
            raise DataError("lessons of a night: there are none of tonight; what they were read from is damaged")
        tonight, text = Lessons.from_tensors(parts.pop("tonight")), parts.pop("text", {}).get("windows")
        importance, anchor = parts.pop("importance", None), parts.pop("anchor", None)
        held = Held(importance, anchor) if importance and anchor else None
        return cls(tonight, [Lessons.from_tensors(parts[part]) for part in sorted(parts)], text, held)


class Night(NamedTuple):
    """What one sleep has done."""

    delta: dict[str, Tensor]
    """To be added to the slow weights (`add`)."""
    metrics: dict[str, float]


def slow_values(model: Cortex) -> dict[str, Tensor]:
    """The slow weights themselves, by name. Empty for a model without."""
    return {
        f"{layer}.slow.values": sidecar.slow.values
        for layer, sidecar in model.sidecars.items()
        if sidecar.slow is not None  # type: ignore[union-attr]
    }


@torch.no_grad()
def add(model: Cortex, delta: Mapping[str, Tensor]) -> None:
    """Merge what a night has learned."""
    for name, values in slow_values(model).items():
        values += delta[name].to(values.device)


def consolidate(
    model: Cortex,
    evening: Evening,
    config: SleepConfig,
    after_backward: Callable[[], None] = lambda: None,
    scaling: ScalingConfig | None = None,
) -> Night:
    """Teach the slow weights tonight's lessons among old ones, in a step for each draw of these.

    Functional distillation (Hinton et al. 2015): KL of what the teacher said to what the model with empty fast weights
    says, by gradient descent on the slow weights alone (`RowMomentum`, unless `config.optimizer` is another). What
    is held (`Evening.held`) is added to it. In the end each slot's values are scaled towards a norm, if `scaling` says
    so. The model is given back as it was; what it learned is the result.
    """
    values = slow_values(model)
    before = {name: value.detach().clone() for name, value in values.items()}
    losses: list[float] = []
    learning_at, pace = partial(slow_learning_at, model), Pace(values, config)
    with trained(values):
        optimizer = optimizer_of(values, config, config.learning_rate, RowMomentum)
        for step, old in enumerate(evening.replayed):
            optimizer.zero_grad(set_to_none=True)
            loss = distillation_loss(model, evening.tonight, config.batch_size, config.gradient, learning_at)
            losses.append(loss.item())
            if len(old):
                replayed = distillation_loss(model, old, config.batch_size, config.gradient, learning_at)
                loss = loss + config.replay_weight * replayed
            if evening.text is not None:
                loss = loss + config.mixed_text_weight * text_loss(model, evening.text[step])
            if evening.held is not None:
                loss = loss + evening.held.penalty(values)
            loss.backward()
            after_backward()
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * pace.factor(step + 1)
            optimizer.step()
            pace.stepped()
        pace.end()
    if scaling is not None and scaling.rate:
        with torch.no_grad():
            for value in values.values():
                value.copy_(scaled(value, scaling))
    delta = {name: value.detach() - before[name] for name, value in values.items()}
    with torch.no_grad():
        for name, value in values.items():
            value.copy_(before[name])
    length = torch.stack([change.norm() for change in delta.values()]).norm()
    return Night(
        delta,
        {"sleep/loss_first_nats": losses[0], "sleep/loss_last_nats": losses[-1], "sleep/delta_norm": float(length)},
    )


def distillation_loss(
    model: Cortex,
    lessons: Lessons,
    batch_size: int,
    gradient: str = "answer",
    learning_at: LearningAt = lambda tokens: nullcontext(),
) -> Tensor:
    """KL of what was taught to what the model with empty fast weights says: mean over lessons, some at a time.
    `gradient` and `learning_at` as of `lesson_losses`."""
    total = torch.zeros((), device=model.backbone.device)
    for chosen in torch.arange(len(lessons)).split(batch_size):
        total = total + lesson_losses(model, lessons.at(chosen), gradient, learning_at).sum()
    return total / len(lessons)


@contextmanager
def trained(values: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it, gradients flow to these values, of which nothing asks for any otherwise."""
    for value in values.values():
        value.requires_grad_(True)
    try:
        yield
    finally:
        for value in values.values():
            value.requires_grad_(False)
            value.grad = None
