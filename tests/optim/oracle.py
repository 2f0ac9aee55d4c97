"""APOLLO as one would write it down: one parameter, one channel, one number after the other, in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from cortex_core.optim.projection import draw, projection_seed

GROWTH = 1.01


def adam(number: float, moments: list[float], step: int, betas: tuple[float, float], eps: float) -> float:
    """Takes one number in and gives its direction."""
    moments[0] = betas[0] * moments[0] + (1 - betas[0]) * number
    moments[1] = betas[1] * moments[1] + (1 - betas[1]) * number**2
    return moments[0] / (1 - betas[0] ** step) / (math.sqrt(moments[1] / (1 - betas[1] ** step)) + eps)


class OneByOne:
    """One parameter and what is remembered of it."""

    def __init__(self, name: str, value: Tensor, *, seed: int, **settings: Any) -> None:
        self.name, self.value, self.seed, self.settings = name, value.double().clone(), seed, settings
        self.steps, self.norm = 0, 0.0
        self.moments: dict[tuple[int, ...], list[float]] = {}

    def step(self, gradient: Tensor) -> None:
        self.steps += 1
        kept = 1 - self.settings["lr"] * self.settings["weight_decay"]
        gradient, rank = gradient.double(), self.settings["rank"]
        if gradient.ndim == 2 and min(gradient.shape) > rank:
            tall = gradient.shape[0] > gradient.shape[1]
            update = self.settings["scale"] * self.scaled(gradient.T if tall else gradient)
            update = update.T if tall else update
        else:
            update = torch.zeros_like(gradient)
            for place in itertools.product(*map(range, gradient.shape)):
                update[place] = self.direction(place, gradient[place].item())
        self.value = kept * self.value - self.settings["lr"] * update

    def scaled(self, gradient: Tensor) -> Tensor:
        rank, (rows, columns) = self.settings["rank"], gradient.shape
        number = (self.steps - 1) // self.settings["update_proj_gap"]
        projection = draw(rank, rows, projection_seed(self.seed, self.name, number), torch.device("cpu")).double()
        before, after = [], []
        for column in range(columns):
            seen = [sum((projection[k] * gradient[:, column]).tolist()) for k in range(rank)]
            directions = [self.direction((k, column), seen[k]) for k in range(rank)]
            exact = self.settings["lengths"] == "exact"
            before.append(math.hypot(*(gradient[:, column].tolist() if exact else seen)))
            after.append(math.hypot(*directions))
        if self.settings["scale_type"] == "tensor":
            before, after = [math.hypot(*before)] * columns, [math.hypot(*after)] * columns
        update = torch.stack([
            gradient[:, column] * (after[column] / before[column] if before[column] else 0.0) for column in range(columns)
        ], 1)  # fmt: skip
        norm = update.norm().item()
        if self.norm and norm > GROWTH * self.norm:
            update, norm = update * (GROWTH * self.norm / norm), GROWTH * self.norm
        self.norm = norm
        return update

    def direction(self, place: tuple[int, ...], number: float) -> float:
        moments = self.moments.setdefault(place, [0.0, 0.0])
        return adam(number, moments, self.steps, self.settings["betas"], self.settings["eps"])
