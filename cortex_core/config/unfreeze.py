"""Guarded unfreezing: which modules of the backbone may change, how they learn, and how far the model may go."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cortex_core.config.settings import NonNegative, PositiveInt, Settings


class UnfreezeConfig(Settings):
    """Low-rank deltas of backbone modules that learn during sleep, inside a trust region around the original model."""

    modules: Annotated[tuple[str, ...], Field(min_length=1)] = ("*",)
    """Patterns of names of linear modules that may be chosen, such as `*.mlp.*`; `*` stands for any characters."""
    layers: Literal["all"] | tuple[Annotated[int, Field(ge=0)], ...] = "all"
    """Decoder layers, from 0, whose modules may be chosen."""
    num_modules: PositiveInt = 24
    """Modules that are chosen at most: those whose lessons weigh most against what text would suffer."""
    rank: PositiveInt = 8
    """Rank of a delta, at most the smaller side of its weight. Parameters grow linearly with it."""
    scale: Annotated[float, Field(gt=0.0)] = 1.0
    """Factor of a delta's output. Larger makes each step of the optimizer larger, as a higher learning rate does."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the deltas' random halves and of the labels that say what text is sensitive to."""
    steps: PositiveInt = 128
    """Optimizer steps at most; fewer where the trust region allows none that goes on."""
    lead_tokens: Annotated[int, Field(ge=0)] = 200
    """Ordinary text before a question at most, another in each step, few tokens as often as many. With 0 an answer is
    known where it was learned, at the beginning of a text, and nowhere else. More lengthens nights; together with its
    question it has at most a segment's tokens."""
    learning_rate: Annotated[float, Field(gt=0.0, le=1e30)] = 3e-3
    """Rate of Adam on the deltas, at most: it is halved whenever a step has left the trust region, and doubled by one
    that stays inside."""
    max_backtracks: Annotated[int, Field(ge=0)] = 4
    """Shorter tries at one step after the first has left the trust region; when all have, learning stops."""
    replayed: Annotated[int, Field(ge=0)] = 32
    """Lessons of earlier nights that are drawn anew for every step; 0 replays nothing."""
    replay_weight: NonNegative = 1.0
    """Weight of what is replayed, against tonight's lessons."""
    text_weight: NonNegative = 300.0
    """Weight of KL(original || model) on ordinary text, in nats per token, against the loss of tonight's lessons."""
    text_windows: PositiveInt = 4
    """Windows of that text per step."""
    batch_size: PositiveInt = 64
    """Questions that are answered side by side: a matter of memory and speed alone."""
    max_text_nats: NonNegative = 0.01
    """Largest KL(original || model) on held-out text, mean per token."""
    max_probe_nats: NonNegative = 0.01
    """Largest KL(original || model) of the answers to a probe set, mean per prompt."""
