"""Guarded unfreezing: low-rank deltas of the backbone learn lessons, and never leave a trust region around it.

The region is a statement about the model, not about the parameters: whatever was learned, on every set that a guard
watches the model is no further from the original one than its bound. Every step is measured before it counts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.optim import Adam, Optimizer

from cortex_core.backbone.low_rank import LowRankDeltas
from cortex_core.backbone.model import Cortex
from cortex_core.backbone.prompts import Prompts
from cortex_core.config import NightConfig, UnfreezeConfig
from cortex_core.consolidation.guard import DriftGuard, Guard, ProbeGuard
from cortex_core.consolidation.learning import Pace, optimizer_of, text_loss
from cortex_core.consolidation.lessons import Lessons
from cortex_core.consolidation.sleep import Evening, distillation_loss, trained
from cortex_core.errors import ConfigError

Region = Mapping[str, Guard]
"""What is watched, by name. Empty is no trust region: whatever is a number may stay."""


class Step(NamedTuple):
    """One try at one step."""

    number: int
    """Of the gradient, from 1; tries of one number differ in their learning rate."""
    learning_rate: float
    loss_nats: float
    """Before it."""
    drift_nats: dict[str, float]
    """After it, by guard."""
    kept: bool
    """False: it left the region, and was rolled back."""


class Unfrozen(NamedTuple):
    """What was learned is in the deltas; this is how it went."""

    metrics: dict[str, float]
    log: list[Step]


def trust_region(
    model: Cortex, text: Int[Tensor, "windows width"], probes: Prompts | None, config: UnfreezeConfig
) -> dict[str, Guard]:
    """Held-out text, and answers that are to stay as those of `model` are now, each with its bound.

    Call it before anything is learned: see `ProbeGuard`. Raises ConfigError without text.
    """
    region: dict[str, Guard] = {"text": DriftGuard(text, config.max_text_nats)}
    return region if probes is None else region | {"probe": ProbeGuard(model, probes, config.max_probe_nats)}


def unfreeze(
    model: Cortex,
    deltas: LowRankDeltas,
    evening: Evening,
    region: Region,
    config: UnfreezeConfig,
    anchor: Callable[[Cortex], Tensor] | None = None,
    after_backward: Callable[[], None] = lambda: None,
    night: NightConfig | None = None,
    lead: Callable[[Lessons], Lessons] = lambda lessons: lessons,
) -> Unfrozen:
    """Teach deltas that are attached to `model` tonight's lessons among old ones, in a step for each draw of these.

    The loss is that of sleep and, if there is one, `anchor(model)`, such as a `TextAnchor`; the optimizer is Adam on
    the deltas alone. `night` may say otherwise. In each step lessons are read as `lead` gives them back, such as
    `Leads`. `Evening.held` is of slow weights, and does not count here.
    `after_backward` is called where shards are to be let go. A step after which the model lies outside the region is
    undone to the bit, with the optimizer's moments, and tried again half as long; after `max_backtracks` of these
    learning stops. However this ends, by an exception too, the model lies inside.

    Raises ConfigError: no lessons, deltas that are not on `model`, or a model that lies outside to begin with.
    """
    _check_start(model, deltas, evening.tonight, region)
    values, rate, log = deltas.values(), config.learning_rate, []
    before = {name: value.detach().clone() for name, value in values.items()}
    night = night or NightConfig()
    pace = Pace(values, night)
    with trained(values):
        optimizer = optimizer_of(values, night, rate, Adam)
        for number in range(1, len(evening.replayed) + 1):
            loss = _set_gradients(model, deltas, _of_step(evening, number, lead), config, anchor, night)
            after_backward()
            for _ in range(config.max_backtracks + 1):
                log.append(_tried(model, deltas, optimizer, region, number, rate * pace.factor(number), loss))
                if log[-1].kept:
                    rate = min(2 * rate, config.learning_rate)
                    pace.stepped()
                    break
                rate /= 2
            else:
                break
    if night.ema_decay:
        _end_inside(model, values, region, pace)
    moved = torch.stack([(value - before[name]).norm().cpu() for name, value in values.items()]).norm()
    return Unfrozen(_metrics(log, float(moved), measured(model, region)), log)


@torch.no_grad()
def measured(model: Cortex, region: Region) -> dict[str, float]:
    """How far the model is from the original one, by guard, in nats."""
    return {name: guard.drift(model) for name, guard in region.items()}


def _check_start(model: Cortex, deltas: LowRankDeltas, tonight: Lessons, region: Region) -> None:
    if not len(tonight):
        raise ConfigError("unfreeze: there are no lessons; without any there is nothing to learn")
    if not deltas.active or not deltas.on(model):
        raise ConfigError("unfreeze: the deltas are not on this model, or off; call deltas.attach(model) first")
    for name, drift in measured(model, region).items():
        if not region[name].allows(drift):
            raise ConfigError(
                f"unfreeze: by guard {name!r} the model is {drift:.3g} nats from the original one already, further "
                "than it allows; remove what has changed it, or raise the guard's bound"
            )


def _of_step(evening: Evening, number: int, lead: Callable[[Lessons], Lessons]) -> Evening:
    """What one step is about, the first being 1."""
    old = evening.replayed[number - 1]
    text = None if evening.text is None else evening.text[number - 1 : number]
    return Evening(lead(evening.tonight), [lead(old) if len(old) else old], text)


def _set_gradients(
    model: Cortex,
    deltas: LowRankDeltas,
    evening: Evening,
    config: UnfreezeConfig,
    anchor: Callable[[Cortex], Tensor] | None,
    night: NightConfig,
) -> float:
    """Of the deltas and of nothing else, although the sidecars could have some. Returns tonight's loss."""
    size, gradient, at, values = config.batch_size, night.gradient, deltas.learning_at, deltas.values()
    loss = total = distillation_loss(model, evening.tonight, size, gradient, at)
    if len(old := evening.replayed[0]):
        total = loss + config.replay_weight * distillation_loss(model, old, size, gradient, at)
    if evening.text is not None:
        total = total + night.mixed_text_weight * text_loss(model, evening.text[0])
    if anchor is not None:
        total = total + anchor(model)
    gradients = torch.autograd.grad(total, list(values.values()), materialize_grads=True)
    for value, gradient_of in zip(values.values(), gradients, strict=True):
        value.grad = gradient_of
    return loss.item()


@torch.no_grad()
def _end_inside(model: Cortex, values: Mapping[str, Tensor], region: Region, pace: Pace) -> None:
    """End with the night's average, unless that lies outside: the region need not be convex."""
    last = {name: value.detach().clone() for name, value in values.items()}
    pace.end()
    if not all(region[name].allows(drift) for name, drift in measured(model, region).items()):
        for name, value in values.items():
            value.copy_(last[name])


def _tried(
    model: Cortex,
    deltas: LowRankDeltas,
    optimizer: Optimizer,
    region: Region,
    number: int,
    rate: float,
    loss: float,
) -> Step:
    """One step of the optimizer, undone unless the model is inside the region after it."""
    values = deltas.values()
    before = {name: value.detach().clone() for name, value in values.items()}
    moments = copy.deepcopy(optimizer.state_dict())
    kept = False
    try:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        drifts = measured(model, region)
        kept = deltas.is_finite and all(region[name].allows(drift) for name, drift in drifts.items())
    finally:
        if not kept:
            optimizer.load_state_dict(moments)
            with torch.no_grad():
                for name, value in values.items():
                    value.copy_(before[name])
    return Step(number, rate, loss, drifts, kept)


def _metrics(log: list[Step], moved: float, drifts: dict[str, float]) -> dict[str, float]:
    steps = sum(step.kept for step in log)
    return {
        "unfreeze/loss_first_nats": log[0].loss_nats,
        "unfreeze/loss_last_nats": log[-1].loss_nats,
        "unfreeze/steps": float(steps),
        "unfreeze/rollbacks": float(len(log) - steps),
        "unfreeze/learning_rate": log[-1].learning_rate,
        "unfreeze/delta_norm": moved,
    } | {f"unfreeze/{name}_nats": drift for name, drift in drifts.items()}
