"""How fast each head forgets: one decay for all, several time scales, or half-lives that are learned."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cortex_core.config import FastWeightsConfig


class Decay(nn.Module):
    """ln of the decay per tick, per head. Heads take the configured time scales in turn.

    Learned: ln decay = -(floor + exp(log_rate)), at most -`floor`, below which the rule would not be stable.
    """

    def __init__(self, config: FastWeightsConfig, heads: int) -> None:
        super().__init__()
        scales = [config.time_scales[head % len(config.time_scales)] for head in range(heads)]
        rates = torch.tensor([-math.log(config.decay) / scale for scale in scales])
        self.floor = config.slowest_rate if config.learn_decay else 0.0
        self.log_rate = nn.Parameter((rates - self.floor).clamp_min(1e-6).log()) if config.learn_decay else None
        self.register_buffer("rates", rates, persistent=False)
        self.rates: Tensor

    def forward(self) -> Float[Tensor, " heads"]:
        """ln of what one tick leaves, at most 0."""
        return -self.rates if self.log_rate is None else -(self.floor + self.log_rate.exp())

    @torch.no_grad()
    def half_lives(self) -> Float[Tensor, " heads"]:
        """Ticks after which half is left; infinite without decay."""
        return math.log(0.5) / self()
