"""Variable tracking (RULER): " let river stone;" ... " copy lamp river;" ... " value lamp" must be answered " stone".

Hsieh et al. 2024, "RULER: What's the Real Context Size of Your Long-Context Language Models?" A variable that is asked
about may have been bound through other variables, so facts that lie far apart must be put together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cortex_core.errors import ConfigError
from cortex_core.tasks.layout import Sheet, TextTask, rounds


@dataclass(frozen=True)
class VariableTracking(TextTask):
    """`num_chains` chains of `hops` + 1 variables: the first is bound to a value, each other one to the one before it.

    Facts of different chains are told in turns, at random; every variable of every chain is asked once, then again.
    """

    name: ClassVar[str] = "variable_tracking"
    scattered: ClassVar[bool] = True

    num_chains: int = 2
    hops: int = 2
    """Copies in a chain, 1 to 3: what the last variable is bound to is known after so many steps."""

    def __post_init__(self) -> None:
        """Raises ConfigError when a number is out of its bounds, or words are too few."""
        if self.num_chains < 1:
            raise ConfigError(f"num_chains = {self.num_chains} must be at least 1")
        if not 1 <= self.hops <= 3:
            raise ConfigError(f"hops = {self.hops} must lie in 1 to 3")
        self.check_words(self.num_chains * (self.hops + 1), self.num_chains)

    def chance(self) -> float:
        """A guess is one of the values that were told, one for each chain; a lone one is any of the pool."""
        return 1 / self.num_chains if self.num_chains > 1 else super().chance()

    def sheet(self, index: int, num_queries: int) -> Sheet:
        rng, length = self.rng(index), self.hops + 1
        variables, values = self.words(index, rng, self.num_chains * length, self.num_chains)
        told, facts = [0] * self.num_chains, []
        for chain in rng.permutation(np.repeat(np.arange(self.num_chains), length)):
            at = int(chain) * length + told[chain]
            if told[chain]:
                facts.append(self.line(" copy", (variables[at], variables[at - 1])))
            else:
                facts.append(self.line(" let", (variables[at], values[chain])))
            told[chain] += 1
        asked = rounds(rng, len(variables), num_queries)
        return Sheet(
            facts,
            [self.line(" value", (variables[at], values[at // length]), num_answers=1) for at in asked],
        )
