"""How a night learns: six scales at which what is known already can be kept, each with a switch of its own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cortex_core.config.settings import NonNegative, PositiveInt, Settings


class NightConfig(Settings):
    """How lessons become changes of weights, in slow weights and in the backbone alike."""

    optimizer: Literal["row_momentum", "adamw", "apollo", "apollo_mini"] | None = None
    """What makes steps of gradients. None is row_momentum for slow weights, whose lessons touch few rows each, and Adam
    for the backbone (adamw is the same there: nothing decays). apollo and apollo_mini take Adam's factors of whole
    channels, or of the whole matrix. Each needs a learning rate of its own."""
    gradient: Literal["answer", "answer_context_frozen", "all_tokens"] = "answer"
    """What is learned from a question: its answer alone; that, with what the learned weights add at the tokens before
    the last one held constant; or each of its tokens as well, by cross-entropy. Freezing protects no weight: all
    positions share them, and the last one's gradient reaches every one. It only leaves out what the same weights do to
    how the question itself is read."""
    teacher: bool = True
    """Whether the model with its fast weights answers the questions, as sure as it is. False: nobody does, and there is
    one stage. What was written is learned from the text as it was read and behind each question, by cross-entropy."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of each night over which the learning rate rises to its value; 0 begins with it."""
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """What a step leaves of the average over the weights of one night, with which the night ends; 0 ends with those of
    the last step."""
    mixed_text_weight: NonNegative = 0.0
    """Weight of next-token loss on ordinary text among the lessons, against tonight's; 0 mixes in none."""
    mixed_text_windows: PositiveInt = 4
    """Windows of that text in each step, drawn anew."""
