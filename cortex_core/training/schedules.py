"""What changes with the step: the learning rate, and how much the write penalty counts."""

from __future__ import annotations

from cortex_core.config import OptimizerConfig, TrainingConfig


def sparsity_factor(step: int, training: TrainingConfig) -> float:
    """0 until the first share of `sparsity_span`, rising to 1 at the second.

    A gate that is pushed shut before it has found what to write never opens again: in its dead zone it has no gradient.
    """
    begin, end = training.sparsity_span
    done = step / training.steps
    return min(1.0, max(0.0, (done - begin) / (end - begin))) if begin < end else float(done >= end)


def learning_rate_factor(step: int, steps: int, settings: OptimizerConfig) -> float:
    """Linear warm-up to 1, flat for the first half, then linear decay to `final_frac`."""
    warmup = min(1.0, (step + 1) / max(settings.warmup_steps, 1))
    decay = min(1.0, (steps - step) / max(steps / 2, 1))
    return warmup * (settings.final_frac + (1 - settings.final_frac) * decay)
