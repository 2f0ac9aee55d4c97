"""Holding slow weights to where they were, as firmly as the diagonal of the Fisher matrix says (online EWC).

The anchor stands for a whole consolidation epoch. Set anew before every step, as in the source, the penalty's gradient
would be 0 wherever it is asked for: it would bound each step and never how far they lead together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from cortex_core import files
from cortex_core.config import FisherConfig
from cortex_core.consolidation.per_example import (
    ExampleLogits,
    ExampleLoss,
    Examples,
    Parameters,
    nll,
    sampled_labels,
    squared_gradients,
)
from cortex_core.errors import ConfigError, DataError, IncompatibleError

SCHEMA = "cortex-fisher/1"


@dataclass(frozen=True)
class FisherDiagonal:
    """How much what is known depends on each parameter, and where these stood. A value: changes make a new one."""

    values: dict[str, Tensor]
    """The diagonal, over the epochs that are over. float32, not negative."""
    anchors: dict[str, Tensor]
    """The parameters at the last `anchor`."""
    sums: dict[str, Tensor]
    """Squared gradients of the examples of this epoch."""
    num_examples: int = 0
    """How many they are."""
    num_epochs: int = 0
    """Epochs that are over."""

    @classmethod
    def empty(cls, parameters: Parameters) -> FisherDiagonal:
        """Nothing is known yet, so nothing is held but by `damping`; the anchor is where the parameters stand.

        Raises ConfigError without parameters.
        """
        if not parameters:
            raise ConfigError("parameters: there are none to hold; give those that sleep changes")
        zeros = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in parameters.items()}
        return cls(zeros, _snapshot(parameters), dict(zeros))

    def observe(
        self, loss: ExampleLoss, parameters: Parameters, examples: Examples, config: FisherConfig
    ) -> FisherDiagonal:
        """With the squared gradients of these examples. The loss is what says whose labels: see `observe_categorical`.

        Raises IncompatibleError for other parameters; DataError for bad examples.
        """
        self._check_same(parameters)
        new, count = squared_gradients(loss, parameters, examples, config)
        sums = {name: total + new[name] for name, total in self.sums.items()}
        return replace(self, sums=sums, num_examples=self.num_examples + count)

    def observe_categorical(
        self,
        logits: ExampleLogits,
        parameters: Parameters,
        examples: Examples,
        config: FisherConfig,
        *,
        generator: Generator | None = None,
    ) -> FisherDiagonal:
        """With the squared gradients of the log-likelihood of `examples["labels"]`: as given, or, with `labels =
        "sampled"`, drawn from the model by `generator`. Raises ConfigError if that is missing."""
        if config.labels == "sampled":
            if generator is None:
                raise ConfigError('labels = "sampled" draws from the model: give a seeded generator')
            examples = sampled_labels(logits, parameters, examples, generator)
        return self.observe(nll(logits), parameters, examples, config)

    def anchor(self, parameters: Parameters, config: FisherConfig) -> FisherDiagonal:
        """A consolidation epoch is over: its mean joins the diagonal, and from now on the parameters are held here.

        An epoch without examples only moves the anchor: nothing was learned that would be worth more than before.
        """
        self._check_same(parameters)
        values = self.values
        if self.num_examples:
            values = {
                name: config.decay * value + self.sums[name] / self.num_examples for name, value in values.items()
            }
        zeros = {name: torch.zeros_like(total) for name, total in self.sums.items()}
        epochs = self.num_epochs + (self.num_examples > 0)
        return FisherDiagonal(values, _snapshot(parameters), zeros, 0, epochs)

    def penalty(self, parameters: Parameters, config: FisherConfig) -> Tensor:
        """weight / 2 · Σ (F + damping) (θ − anchor)², to be added to the loss of an epoch."""
        self._check_same(parameters)
        total = torch.zeros((), device=next(iter(self.values.values())).device)
        for name, value in self.values.items():
            apart = parameters[name].float() - self.anchors[name].float()
            total = total + ((value + config.damping) * apart.square()).sum()
        return 0.5 * config.weight * total

    def _check_same(self, parameters: Parameters) -> None:
        expected = {name: tuple(value.shape) for name, value in self.values.items()}
        found = {name: tuple(value.shape) for name, value in parameters.items()}
        if expected != found:
            name, shape = sorted(set(expected.items()) ^ set(found.items()))[0]
            raise IncompatibleError(
                f"parameter {name} {list(shape)}: the Fisher diagonal was made for other parameters; make a new one"
            )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All of it, as tensors and a table that JSON can hold."""
        parts = {"values": self.values, "anchors": self.anchors, "sums": self.sums}
        tensors = {f"{part}.{name}": value for part, named in parts.items() for name, value in named.items()}
        return tensors, {"num_examples": self.num_examples, "num_epochs": self.num_epochs}

    def restored(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> FisherDiagonal:
        """As `state` says, for the same parameters. Raises DataError for damage, IncompatibleError for others."""
        parts: dict[str, dict[str, Tensor]] = {"values": {}, "anchors": {}, "sums": {}}
        for key, value in tensors.items():
            part, _, name = key.partition(".")
            if part not in parts:
                raise DataError(f"Fisher diagonal: {key} is no part of it; it is damaged")
            parts[part][name] = value.to(self.values[name].device) if name in self.values else value
        for named in parts.values():
            self._check_same(named)
        whole = [value for name, value in tensors.items() if not bool(torch.isfinite(value).all())]
        negative = any(bool((value < 0).any()) for part in ("values", "sums") for value in parts[part].values())
        counts = [counters.get(name) for name in ("num_examples", "num_epochs")]
        if whole or negative or any(type(count) is not int or count < 0 for count in counts):
            raise DataError(f"Fisher diagonal: numbers that are not finite or negative, or counters {counts}; damaged")
        return FisherDiagonal(**parts, num_examples=int(counts[0] or 0), num_epochs=int(counts[1] or 0))

    def save(self, path: str | Path) -> None:
        """Write one file; the one that is there is replaced only once the new one is whole."""
        files.write(Path(path), SCHEMA, *self.state())

    def load(self, path: str | Path) -> FisherDiagonal:
        """What was saved for the same parameters as this. Raises DataError, IncompatibleError."""
        return self.restored(*files.read(Path(path), SCHEMA, "Fisher diagonal"))

    @property
    def trace(self) -> float:
        """Sum of the diagonal."""
        return math.fsum(float(value.sum()) for value in self.values.values())


def _snapshot(parameters: Parameters) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in parameters.items()}
