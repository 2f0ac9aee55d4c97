"""A life of facts, which shows what sleep is good for."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cortex_core.config.settings import PositiveInt, Settings


class LifeConfig(Settings):
    """What is told by day, to be asked when the fast weights are empty."""

    beside_training: bool = False
    """Lead this life while the memory is trained, spread evenly over the steps, its nights slept by an actor
    (`sleep_actor`) and its dreams, if `sleep.dream_frac` asks for some, dreamed by others (`dream_actors`). The
    addresses of the memory then stay as they are: slow weights are found under them."""
    num_facts: PositiveInt = 200
    """Facts that are told, each once. A key is a token of its own: at most about as many as the tokenizer has words."""
    facts_per_day: PositiveInt = 8
    """Of these, how many on one day, which has `sleep.every_tokens` tokens."""
    lead_tokens: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 40, 200)
    """Tokens of other text before a question, each asked apart: what is known is known anywhere."""
    checkpoint_every_days: PositiveInt = 5
    """Days between checkpoints, from which an interrupted life goes on."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the facts and of the text that they stand in."""
