"""Ordinary text before a question, so that what is learned of it does not hold at the beginning of a text alone."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Int
from torch import Tensor

from cortex_core.backbone.prompts import Prompts
from cortex_core.consolidation.lessons import Lessons
from cortex_core.errors import ConfigError


class Leads:
    """Puts text before each question of some lessons, other text at each call; what was taught stays.

    Slow weights have addresses that hardly depend on what a question stands behind. A backbone has none: a low-rank
    change that has seen a question in one place knows its answer in that place. How much text is drawn evenly on a
    logarithmic scale, so that a few tokens are as common as many. Question and lead lie in one window.
    """

    def __init__(self, windows: Int[Tensor, "windows width"], most_tokens: int, seed: int = 0) -> None:
        """`windows` of text, none longer than a segment; `most_tokens` of a lead, 0 for none. Raises ConfigError for
        leads without text."""
        if most_tokens and not windows.numel():
            raise ConfigError(f"lead_tokens = {most_tokens}: leads need at least one window of text, or be 0")
        self._windows, self._most_tokens, self._seed = windows.cpu().numpy(), most_tokens, seed
        self.begin(0)

    def begin(self, night: int) -> None:
        """Draw from here on what belongs to this night, whatever was drawn before: nights go on from files."""
        self._rng = np.random.default_rng([self._seed, night])

    def __call__(self, lessons: Lessons) -> Lessons:
        """The same lessons, behind text."""
        if not self._most_tokens:
            return lessons
        rows = [
            [*self._drawn(length), *ids[:length]]
            for ids, length in zip(lessons.prompts.input_ids.tolist(), lessons.prompts.lengths.tolist(), strict=True)
        ]
        return Lessons(Prompts.of(rows), lessons.taught, lessons.gain_nats)

    def _drawn(self, question_tokens: int) -> list[int]:
        width = self._windows.shape[1]
        most = max(0, min(self._most_tokens, width - question_tokens))
        tokens = int(math.exp(self._rng.random() * math.log(most + 2))) - 1
        window, start = self._rng.integers(len(self._windows)), self._rng.integers(width - tokens + 1)
        return self._windows[window, start : start + tokens].tolist()
