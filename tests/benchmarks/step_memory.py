"""What a real training step of a small model takes, for comparison with `cortex plan`: measured, not computed.

Activations are what torch's allocator says (`torch.profiler`): every block that it hands out or takes back, temporary ones
inside of an operation among them. Kept: what it has handed out when the forward pass ends. (Counting the tensors that
autograd saves, through its hooks, says more: outputs that are saved through a hook stay longer.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from cortex_core.backbone.model import Cortex
from cortex_core.config import OptimizerConfig, TrainingConfig
from cortex_core.training.loop import Learner
from cortex_core.training.objectives import Batch, ReadingLoss


class Measured(NamedTuple):
    """Bytes."""

    kept: int
    """For the backward pass of one micro-batch."""
    activations: int
    """Most that a step holds at once, on top of what was there before it."""
    sidecars: int
    gradients: int
    optimizer: int
    """Moments and weight average."""
    session: int
    """State of one sequence."""


def measure(model: Cortex, batch: Batch, training: TrainingConfig) -> Measured:
    """Of one step on one micro-batch."""
    objective = ReadingLoss(model, training)
    learner = Learner(model, objective, training, OptimizerConfig())
    learner.step([batch])
    learner.optimizer.zero_grad(set_to_none=True)
    kept, (_, peak) = kept_bytes(objective, batch), _profiled(objective, batch, backward=True)
    learner.step([batch])
    gradients = sum(_size(p.grad) for p in model.sidecars.parameters() if p.grad is not None)
    moments = sum(_size(v) for state in learner.optimizer.state.values() for k, v in state.items() if k != "step")
    session = model.new_session(1)
    return Measured(
        kept,
        peak,
        sum(map(_size, model.sidecars.parameters())),
        gradients,
        moments + sum(map(_size, learner.average.values())),
        sum(state.num_bytes for state in session.states.values()),
    )


def random_batch(sizes: Batch, vocabulary: int) -> Batch:
    """A batch of these sizes, with the same questions and tokens drawn at random."""
    generator = torch.Generator().manual_seed(0)

    def tokens(like: Tensor) -> Tensor:
        return torch.randint(3, vocabulary, like.shape, generator=generator)

    return sizes._replace(
        input_ids=tokens(sizes.input_ids),
        in_window_ids=tokens(sizes.in_window_ids),
        filler_ids=tokens(sizes.filler_ids),
    )


def kept_bytes(objective: nn.Module, batch: Batch) -> int:
    """What the forward pass leaves, its loss among it."""
    return _profiled(objective, batch, backward=False)[0]


def _profiled(objective: nn.Module, batch: Batch, *, backward: bool) -> tuple[int, int]:
    """Bytes held at the end and at most, of a forward pass or a whole micro-batch."""
    objective.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        loss, _ = objective(batch)
        if backward:
            loss.backward()
    assert loss.requires_grad and seen.profiler is not None and seen.profiler.kineto_results is not None
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return total, most


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
