"""What a sweep varies: settings by their dotted names, each with a range; and the run that it varies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from cortex_core.errors import ConfigError

Search = Literal["tpe", "random", "grid", "pbt"]
Value = bool | int | float | str
SHIPPED = ("fast_weights", "plasticity", "sparsity", "learning")
"""Studies that ship: modules of this package, each with a `STUDY`."""
SHORT: Mapping[str, object] = MappingProxyType({
    "training.steps": 80, "training.checkpoint_every_steps": 20,
    "validation.every_steps": 20, "validation.num_examples": 24,
    "evaluation.gaps_tokens": [0, 1024, 4096], "evaluation.num_examples": 40, "evaluation.perplexity_tokens": 16_384,
    "cluster.num_workers": 1, "sharding.stage": 0,
})  # fmt: skip
"""What the shipped studies change of their recipe: shorter runs, one worker each, so that two CPUs run two at a time.
With one worker there is nothing to shard the backbone over."""


@dataclass(frozen=True)
class Real:
    """Numbers from `low` to `high`, evenly or, with `log`, evenly in their logarithm."""

    low: float
    high: float
    log: bool = False

    def grid(self, points: int) -> list[float]:
        """`points` values from end to end."""
        shares = [i / (points - 1) for i in range(points)] if points > 1 else [0.5]
        if self.log:
            return [self.low * (self.high / self.low) ** share for share in shares]
        return [self.low + (self.high - self.low) * share for share in shares]


@dataclass(frozen=True)
class Whole:
    """Whole numbers from `low` to `high`, both included."""

    low: int
    high: int
    log: bool = False

    def grid(self, points: int) -> list[int]:
        """At most `points` values from end to end."""
        return sorted({round(value) for value in Real(self.low, self.high, self.log).grid(points)})


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: tuple[Value, ...]

    def grid(self, points: int) -> list[Value]:
        """All of them, whatever `points` is."""
        return list(self.values)


Domain = Real | Whole | Choice


@dataclass(frozen=True)
class Study:
    """One sweep, before its trials are drawn."""

    name: str
    about: str
    """One line: what is asked."""
    space: Mapping[str, Domain]
    """Dotted settings of a run, each with its range."""
    recipe: str = "demo"
    """The run that is varied: a TOML file, or the name of one that ships."""
    overrides: Mapping[str, object] = field(default_factory=lambda: SHORT)
    """Dotted settings over those of the recipe, for all trials."""
    num_trials: int = 16
    """Trials, unless the command says otherwise. A grid has as many as its points."""
    search: Search = "tpe"
    """How values are drawn: `tpe` learns from the trials before (Bergstra et al. 2011), `random`, or a `grid`; `pbt`
    moves them while trials go on, the poor ones from the weights of good ones (Jaderberg et al. 2017)."""
    grid_points: int = 3
    """Values per range in a grid."""


def domain(setting: str, described: object) -> Domain:
    """A range as TOML has it: a list of values, or a table of `low`, `high` and, if wanted, `log = true`.

    Raises ConfigError that names the setting.
    """
    form = "write a list of values, or { low = 1e-4, high = 1e-2, log = true }"
    if isinstance(described, list):
        if len(described) < 2 or not all(isinstance(value, Value) for value in described):
            raise ConfigError(
                f"space.{setting} = {described}: must be two values or more, each a number, text or true/false"
            )
        return Choice(tuple(described))
    if (
        not isinstance(described, dict)
        or set(described) - {"low", "high", "log"}
        or not {"low", "high"} <= set(described)
    ):
        raise ConfigError(f"space.{setting} = {described}: is no range: {form}")
    low, high, log = described["low"], described["high"], described.get("log", False)
    numbers = [isinstance(value, (int, float)) and not isinstance(value, bool) for value in (low, high)]
    if not all(numbers) or not isinstance(log, bool) or not all(map(math.isfinite, (low, high))):
        raise ConfigError(f"space.{setting} = {described}: is no range: {form}")
    if low >= high or (log and low <= 0):
        bound = "low must be above 0 where log = true" if log and low <= 0 else "low must be below high"
        raise ConfigError(f"space.{setting} = {described}: {bound}")
    if isinstance(low, int) and isinstance(high, int):
        return Whole(low, high, log)
    return Real(float(low), float(high), log)
